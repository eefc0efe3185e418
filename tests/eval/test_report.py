"""The report: what it shows, that it works in a browser, and that nothing gets in or out of the page."""

import base64
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from am_diffusers.evaluation.statistics import Estimate, compare
from am_diffusers.rewards import RewardScale
from evaluating.candidates import BASE, Candidate
from evaluating.report import images as report_pictures
from evaluating.report.cost_figures import (
    Point,
    gain_against_diversity,
    gain_against_path_kl,
    pareto_front,
    until,
)
from evaluating.report.figures import HEIGHT, WIDTH
from evaluating.report.findings import candidate_labels, verdict
from evaluating.report.images import data_address, embed_images, prompts_to_show
from evaluating.report.numbers import plain, signed
from evaluating.report.page import write_report
from evaluating.report.svg import legend_above, panel, styled
from evaluating.summary.summarising import summarise
from evaluating.summary.summary import FEWEST_PROMPTS
from evaluating.summary.tilt import Curve, Target
from report_results import HOSTILE, REWARDS, candidates, colour, synthetic_results, tilted_results

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PROMPTS = [
    HOSTILE,
    *(f"a {animal} on a {ground}" for animal in ("cat", "dog", "owl") for ground in ("hill", "sea")),
]
STYLES = ("<b>bold</b>", "flat", "flat", "3d", "", r"$\frac$", "3d")
SHOWN = 5


def report(results, file, **options):
    return write_report(results, summarise(results, resamples=200), file, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return synthetic_results(
        tmp_path_factory.mktemp("evaluation"),
        PROMPTS,
        candidates((0.5, 1.0)),
        categories={"style": STYLES},
        path_kl=True,
    )


@pytest.fixture(scope="module")
def file(results):
    return report(results, results.folder / "report.html", max_prompts=SHOWN)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert "CI" not in os.environ, "CI needs Debian's chromium"
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield started
        started.close()


class Visitor:
    """Opens pages, and keeps what went wrong in them and what they asked of the network."""

    def __init__(self, browser):
        self.browser = browser
        self.complaints = []

    def __call__(self, file, width=1280, javascript=True):
        page = self.browser.new_page(viewport={"width": width, "height": 900}, java_script_enabled=javascript)
        page.set_default_timeout(5000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked(request.url, file.as_uri()))
        page.goto(file.as_uri())
        return page

    def asked(self, url, own):
        if url != own and not url.startswith("data:"):
            self.complaints.append(url)


@pytest.fixture
def visit(browser):
    """Nothing may have gone wrong in a page, or left it, that a test hasn't taken from the complaints."""
    visitor = Visitor(browser)
    yield visitor
    for context in browser.contexts:
        context.close()
    assert visitor.complaints == []


def centre(locator, share=0.5):
    """Colour that is seen in the middle of an element, `share` of its width from its left."""
    picture = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    return picture.getpixel((int(share * picture.width), picture.height // 4))


def pictured(page, prompt):
    """The first picture of a prompt: its place in the list, scrolled to."""
    article = page.locator(f"#p{prompt}")
    article.scroll_into_view_if_needed()
    return article.locator(".shot").first


def shown_prompts(page):
    found = page.locator("article:not([hidden]) .row").all_text_contents()
    return [int(row) for row in found]


def pictured_prompts(page):
    found = page.eval_on_selector_all("article:has(.shot)", "all => all.map(each => each.dataset.prompt)")
    return [int(row) for row in found]


def gains(results, reward, place=1):
    """Mean change of each prompt, by a tuned candidate."""
    base, tuned = results.candidates[0], results.candidates[place]
    return (results.scores[tuned.key][reward] - results.scores[base.key][reward]).mean(axis=1)


def test_nothing_can_leave_the_page(visit, file):
    page = visit(file)
    sent = "url => fetch(url).then(() => 'sent', () => 'refused')"
    assert page.evaluate(sent, "http://127.0.0.1:9/") == "refused"
    assert visit.complaints
    assert all("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.complaints.clear()


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(visit, file, width):
    page = visit(file, width)
    page.locator("summary:visible").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_prompt_is_text(visit, file):
    page = visit(file)
    assert HOSTILE in page.locator("#p0 h3").text_content()
    assert page.locator("#p0 .tags").text_content() == STYLES[0]
    options = page.locator("select.category option").all_text_contents()
    assert options == ["all", r"$\frac$", "3d", STYLES[0], "flat"]
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("#p0 :not(.shot) > img[src=x]").count() == 0


def test_other_scripts_would_not_run(visit, file, tmp_path):
    """The second wall: had escaping failed somewhere, the policy would let that script not run."""
    broken = tmp_path / "report.html"
    broken.write_text(file.read_text().replace("</main>", "<script>window.hacked = 1</script></main>"))
    assert visit(broken).evaluate("window.hacked") is None
    assert "inline script" in visit.complaints.pop()


def test_search_and_category_narrow_the_list(visit, file):
    page = visit(file)
    assert shown_prompts(page) == list(range(len(PROMPTS)))
    page.fill("#search", "SEA cat")
    assert [PROMPTS[row] for row in shown_prompts(page)] == ["a cat on a sea"]
    assert page.inner_text("#count") == f"1 of {len(PROMPTS)} prompts"
    page.fill("#search", "")
    page.select_option("select.category", "3d")
    assert shown_prompts(page) == [row for row, style in enumerate(STYLES) if style == "3d"]


def test_sorting_is_by_the_chosen_model_and_reward(visit, file, results):
    page = visit(file)
    page.select_option("#sort", "gain")
    assert shown_prompts(page) == list(np.argsort(-gains(results, REWARDS[0])))
    page.select_option("#sort", "loss")
    page.select_option("#candidate", "2")
    page.select_option("#reward", label=REWARDS[1])
    assert shown_prompts(page) == list(np.argsort(gains(results, REWARDS[1], 2)))


def test_slider_pulls_the_base_over_the_tuned_picture(visit, file):
    page = visit(file)
    prompt = pictured_prompts(page)[0]
    stage = pictured(page, prompt).locator(".stage").last
    assert centre(stage, 0.3) == centre(stage, 0.8) == colour(1, prompt, 0)
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + box["height"] / 4, steps=4)
    page.mouse.up()
    assert centre(stage, 0.3) == colour(0, prompt, 0)
    assert centre(stage, 0.8) == colour(1, prompt, 0)
    for _ in range(4):
        page.keyboard.press("PageUp")
    assert centre(stage, 0.7) == colour(0, prompt, 0)


def test_flicker_swaps_in_place_by_the_keyboard(visit, file):
    page = visit(file)
    prompt = pictured_prompts(page)[0]
    shot = pictured(page, prompt)
    stage = shot.locator(".stage").last
    shot.locator("button").focus()
    seen = []
    for _ in range(3):
        seen.append(centre(stage))
        page.keyboard.press("Enter")
    assert seen == [colour(1, prompt, 0), colour(0, prompt, 0), colour(1, prompt, 0)]


def test_menus_switch_model_reward_and_view(visit, file, results):
    page = visit(file)
    prompt = pictured_prompts(page)[-1]
    shot = pictured(page, prompt)
    page.select_option("#candidate", "2")
    page.select_option("#reward", label=REWARDS[1])
    assert centre(shot.locator(".stage").first) == colour(0, prompt, 0)
    assert centre(shot.locator(".stage").last) == colour(2, prompt, 0)
    score = results.scores[results.candidates[2].key][REWARDS[1]][prompt, 0]
    assert float(shot.locator("tr.chosen td").nth(1).inner_text()) == pytest.approx(score, abs=0.005)
    headings = page.locator("#changes h3:visible").all_inner_texts()
    assert headings == [f"Largest {end} in {REWARDS[1]}: mine, scale 1" for end in ("gains", "losses")]
    page.select_option("#view", "over")
    assert shot.locator(".stage").count() == 1
    assert centre(shot.locator(".stage"), 0.3) == colour(0, prompt, 0)
    assert centre(shot.locator(".stage"), 0.7) == colour(2, prompt, 0)


def test_largest_changes_show_their_pictures(visit, file, results):
    page = visit(file)
    slot = page.locator("#changes .slot:visible").first
    slot.scroll_into_view_if_needed()
    base, tuned = (results.scores[candidate.key][REWARDS[0]] for candidate in results.candidates[:2])
    prompt, image = np.unravel_index((tuned - base).argmax(), base.shape)
    assert centre(slot.locator(".stage").last) == colour(1, int(prompt), int(image))
    assert slot.locator("a").text_content() == PROMPTS[prompt]


def test_readable_without_its_script(visit, file):
    page = visit(file, javascript=False)
    assert page.locator("#gains tbody tr:visible").count() == 2 * (1 + len(REWARDS))
    assert page.locator("form, nav select").locator("visible=true").count() == 0
    prompt = int(page.locator("article:has(.shot)").first.get_attribute("data-prompt"))
    figures = pictured(page, prompt).locator("figure")
    assert [centre(figures.nth(i).locator("img")) for i in range(3)] == [
        colour(i, prompt, 0) for i in range(3)
    ]
    assert REWARDS[0] in figures.first.inner_text()


def test_many_prompts_are_built_when_they_come_near(visit, tmp_path):
    prompts = [f"prompt {i}" for i in range(1000)]
    many = synthetic_results(tmp_path, prompts, candidates(), num_images=1, side=4)
    page = visit(report(many, tmp_path / "report.html", max_prompts=1000))
    page.locator("#p0").scroll_into_view_if_needed()
    page.locator("#p0 .stage").last.wait_for()
    assert page.locator(".stage").count() < 100
    page.fill("#search", "prompt 777")
    page.locator("#p777 .stage").last.wait_for()
    assert page.locator("article .stage").count() < 100


def test_says_what_was_left_out(file):
    text = re.sub(r"\s+", " ", file.read_text())
    assert f"Images of {SHOWN} of the {len(PROMPTS)} prompts are embedded" in text
    assert text.count("Images left out.") == len(PROMPTS) - SHOWN


def test_pictures_of_all_prompts_together_are_bounded(results, monkeypatch):
    everything = embed_images(results, 100, 200)
    sizes = [
        sum(len(address) for addresses in of.values() for address in addresses) for of in everything.values()
    ]
    assert list(everything) == prompts_to_show(results, 100)
    monkeypatch.setattr(report_pictures, "MAX_CHARACTERS", sum(sizes[:3]))
    assert list(embed_images(results, 100, 200)) == list(everything)[:3]


def test_same_results_same_page(file, results, tmp_path):
    assert report(results, tmp_path / "report.html", max_prompts=SHOWN).read_bytes() == file.read_bytes()


def test_prompts_shown_are_the_extremes_and_some_spread_evenly(results):
    shown = prompts_to_show(results, 5)
    base, tuned = (results.scores[candidate.key][REWARDS[0]] for candidate in results.candidates[:2])
    change = tuned - base
    extremes = [np.unravel_index(place, change.shape)[0] for place in (change.argmax(), change.argmin())]
    assert shown[:2] == extremes
    assert len(set(shown)) == 5
    assert sorted(prompts_to_show(results, 100)) == list(range(len(PROMPTS)))


def test_small_pictures_are_exact_and_large_ones_made_small(tmp_path):
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.effect_noise((128, 64), 50).convert("RGB").save(small)
    Image.effect_noise((600, 300), 50).convert("RGB").save(large)
    embedded = {file: data_address(file, 200).split(",") for file in (small, large)}
    content = {file: base64.b64decode(text) for file, (_, text) in embedded.items()}
    assert embedded[small][0] == "data:image/png;base64"
    assert content[small] == small.read_bytes()
    assert embedded[large][0] == "data:image/webp;base64"
    assert Image.open(io.BytesIO(content[large])).size == (200, 100)


@pytest.mark.parametrize("damage", ["missing", "empty", "no picture", "cut"])
def test_unreadable_picture_is_named(results, tmp_path, damage):
    file = tmp_path / "pictures.png"
    whole = results.image(results.candidates[1], 2, 1).read_bytes()
    if damage != "missing":
        file.write_bytes({"empty": b"", "no picture": b"no picture", "cut": whole[:-20]}[damage])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        data_address(file, 200)


def test_only_bases_are_refused(results, tmp_path):
    with pytest.raises(ValueError, match="tuned candidate"):
        report(replace(results, candidates=results.candidates[:1]), tmp_path / "report.html")


def test_one_prompt_has_no_intervals(tmp_path):
    alone = synthetic_results(tmp_path, ["a cat"], candidates())
    text = report(alone, tmp_path / "report.html").read_text()
    gains = re.findall(r'data-label="Gain in base sd">(.*?)<', text)
    assert len(gains) == len(REWARDS)
    assert all(re.fullmatch(r"[+\u2212]\d\.\d\d", gain) for gain in gains)


def test_base_without_spread_has_no_unit(tmp_path):
    flat = synthetic_results(tmp_path, PROMPTS, candidates(), categories={"style": STYLES})
    flat.scores[flat.candidates[0].key][REWARDS[0]][:] = 3
    text = report(flat, tmp_path / "report.html").read_text()
    assert text.count("no unit: all base images score the same") == 1


def test_front_is_what_nothing_else_beats_in_both():
    points = [(1.0, 0.0), (0.9, 0.5), (0.8, 0.4), (0.7, 0.9), (0.7, 0.8), (0.9, 0.5)]
    assert pareto_front(points) == [(0.7, 0.9), (0.9, 0.5), (1.0, 0.0)]


def test_labels_say_what_differs():
    two = candidates((0.5, 1.0))
    assert list(candidate_labels(two).values()) == ["base", "mine, scale 0.5", "mine, scale 1"]
    steps = [*candidates(), *candidates(steps=4)]
    assert list(candidate_labels(steps).values()) == [
        "base, 8 steps",
        "mine, 8 steps",
        "base, 4 steps",
        "mine, 4 steps",
    ]


LONG = ("outputs_of_the_first_run_checkpoint-000200", "outputs_of_the_second_run_checkpoint-000300")


def eight():
    """Two LoRAs at two scales and two numbers of steps, behind their two bases."""
    tuned = [
        Candidate(name, steps, 1.0, Path(f"/runs/{name}.safetensors"), scale)
        for name in LONG
        for scale in (0.5, 1.0)
        for steps in (8, 20)
    ]
    return [Candidate(BASE, 8), Candidate(BASE, 20), *tuned]


def cost_figures(text):
    section = text[text.index('<section id="cost">') : text.index('<section id="scores">')]
    return re.findall(r"<svg role.*?</svg>", section, re.DOTALL)


def test_cost_figures_have_one_base_and_one_line_a_lora(tmp_path):
    """What is relative to other bases is in other figures; scales of one LoRA are joined."""
    many = synthetic_results(tmp_path, PROMPTS, eight(), path_kl=True)
    charts = cost_figures(report(many, tmp_path / "report.html").read_text())
    seen = [re.findall(r"weight: 700[^>]*>(\d)</text>", chart) for chart in charts]
    assert [sorted(numbers) for numbers in seen] == [list("1357")] * 2 + [list("2468")] * 2 + (
        [list("1357")] * 2 + [list("2468")] * 2
    )
    legends = [re.findall(r">(base, \d+ steps|outputs[^<]*)</text>", chart) for chart in charts]
    assert legends[0] == ["base, 8 steps", *LONG]
    assert legends[2] == ["base, 20 steps", *LONG]


def test_only_model_has_no_number_in_figures(tmp_path):
    one = synthetic_results(tmp_path, PROMPTS, candidates(), path_kl=True)
    charts = cost_figures(report(one, tmp_path / "report.html").read_text())
    assert len(charts) == 4
    assert not any("weight: 700" in chart for chart in charts)


@pytest.mark.parametrize(("letters", "rows"), [(8, 4), (42, 8)])
def test_legend_leaves_the_panel_its_size(letters, rows):
    with styled():
        figure, axes = panel(WIDTH, HEIGHT)
        for place in range(8):
            axes.plot([0, 1], [place, 1], label=f"{place}".ljust(letters, "n"))
        legend_above(figure)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert len({round(text.get_window_extent().y0) for text in legend.get_texts()}) == rows
    width, height = axes.get_window_extent().size / figure.dpi
    assert width > 0.8 * WIDTH
    assert height == pytest.approx(HEIGHT, rel=0.2)


OUTSIDE = """() => [...document.querySelectorAll("#cost figure text")].filter(text => {
    const [own, all] = [text, text.closest("svg")].map(each => each.getBoundingClientRect());
    return own.left < all.left - 1 || own.right > all.right + 1;
}).map(text => text.textContent)"""
"""What of the figures' texts lies beside its figure."""


def test_figures_of_many_models_can_be_read(visit, tmp_path):
    """Every text of a figure is inside of it."""
    many = synthetic_results(tmp_path, PROMPTS, eight(), path_kl=True)
    page = visit(report(many, tmp_path / "report.html"))
    page.locator("#cost").scroll_into_view_if_needed()
    assert page.evaluate(OUTSIDE) == []


def test_numbers_of_models_that_are_alike_stand_apart():
    places = [(1.04, 0.27), (1.0, 0.485), (0.995, 0.485), (1.04, 0.29), (1.09, 0.485), (0.98, 0.6)]
    points = [
        Point(number, "one", *(Estimate(value, value - 0.3, value + 0.3) for value in place))
        for number, place in enumerate(places, 1)
    ]
    for draw in (gain_against_diversity, gain_against_path_kl):
        texts = re.findall(r'weight: 700[^>]* x="([^"]+)" y="([^"]+)"', draw("pickscore", "base", points))
        where = np.array(texts, float)
        apart = np.hypot(*(where[:, None] - where).transpose(2, 0, 1)) + 99 * np.eye(6)
        assert len(where) == 6
        assert apart.min() > 9


def words(html):
    """What is read of a piece of the page, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).strip()


def header(file):
    return words(re.search(r"<header>.*</header>", file.read_text(), re.DOTALL)[0])


def test_prompts_come_first_among_the_settings_and_reward_models_are_named(tmp_path):
    one = synthetic_results(tmp_path, PROMPTS, candidates())
    named = replace(
        one,
        settings={**one.settings, "prompts": "0badc0de", "prompt_source": "drawbench"},
        reward_models={"pickscore": "asset:p", "hpsv2": None},
    )
    text = header(report(named, tmp_path / "report.html"))
    assert "tuning only. prompts drawbench base model owner/model sampler ode" in text
    assert "reward models pickscore from asset:p LoRA mine" in text
    assert "0badc0de" not in text


def test_loras_of_many_models_are_listed(results, tmp_path):
    many = synthetic_results(tmp_path, PROMPTS, eight())
    text = header(report(many, tmp_path / "report.html"))
    assert f"1 {LONG[0]} /runs/{LONG[0]}.safetensors 0.5 8 1 (off) 2 {LONG[0]}" in text
    assert f"8 {LONG[1]} /runs/{LONG[1]}.safetensors 1 20 1 (off)" in text


def distances(file):
    text = file.read_text()
    if "Images as a set" not in text:
        return []
    section = text[text.index("Images as a set") : text.index('<section id="scores">')]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_distances_of_sets_stand_beside_their_floor(results, file):
    summary = summarise(results, resamples=200)
    moved = [candidate.against_base.frechet["clip"] for candidate in summary.candidates[1:]]
    assert distances(file) == [
        ["Model", "From the base (clip)", "Base from itself (clip)"],
        ["1 mine, scale 0.5", plain(moved[0].halves), plain(moved[0].floor)],
        ["2 mine, scale 1", plain(moved[1].halves), plain(moved[1].floor)],
    ]


def test_distances_from_reference_pictures_are_given_for_the_base_too(results, tmp_path):
    reference = {"clip": np.random.default_rng(0).normal(size=(20, 8))}
    referred = replace(results, reference_features=reference)
    found = distances(report(referred, tmp_path / "report.html", max_prompts=1))
    expected = [plain(each.reference["clip"]) for each in summarise(referred, resamples=9).candidates]
    assert found[0][-1] == "From the reference images (clip)"
    assert [row[-1] for row in found[1:]] == expected
    without = replace(results, features={})
    assert distances(report(without, tmp_path / "none.html", max_prompts=1)) == []


BOTH = Target(0.2, {"pickscore": RewardScale(), "hpsv2": RewardScale(-1.0)})


@pytest.fixture(scope="module")
def tilted(tmp_path_factory):
    """Short of the tilt, beyond it, one with another target, and one whose tilt can't be told."""
    strong = Target(9.0, {"pickscore": RewardScale()})
    return tilted_results(
        tmp_path_factory.mktemp("tilted"),
        PROMPTS,
        (0.5, 3, 0.4, 0.6),
        targets={"share0.4": BOTH, "share0.6": strong},
    )


@pytest.fixture(scope="module")
def tilted_page(tilted):
    return report(tilted, tilted.folder / "report.html", max_prompts=1)


def tilt_section(page):
    return re.search(r'<section id="tilt">.*?</section>', page.read_text(), re.DOTALL)[0]


def test_predictions_stand_beside_results(tilted, tilted_page):
    row = r'<th scope="row">(.*?)</th>\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>'
    cells = [tuple(map(words, texts)) for texts in re.findall(row, tilt_section(tilted_page))]
    found = [each.against_base for each in summarise(tilted, resamples=200).candidates[1:]]

    def row(against, name, role):
        told, gain = against.tilt.predicted.get(name), against.rewards[name].overall.gain
        return f"{name} {role}", signed(told) if told else "can&#39;t be told", signed(gain)

    sums = [
        found[2].tilt.certificate[name].scaled(1 / found[2].tilt.base_sd) for name in ("predicted", "gain")
    ]
    assert cells == [
        *(row(each, *of) for each in found[:2] for of in (("pickscore", "trained"), ("hpsv2", "held-out"))),
        ("weighted sum trained", *map(signed, sums)),
        *(row(found[2], name, "trained") for name in ("pickscore", "hpsv2")),
        *(row(found[3], *of) for of in (("pickscore", "trained"), ("hpsv2", "held-out"))),
    ]


def test_beyond_the_tilt_is_called_over_optimised_in_words(tilted_page):
    texts = re.findall(r'<span class="short">(.*?)</span></th>', tilt_section(tilted_page), re.DOTALL)
    said = [words(text) for text in texts]
    assert len(said) == 4
    beyond = "▼ over-optimised: beyond what base * exp(scale * reward) would give, by +"
    assert [beyond in text for text in said] == [False, True, False, False]
    assert re.search(
        r"Reward scale 0\.4: tilt gap [\d.]+ nats \[.*\]: \d+ % \[.*\] of what was to be", said[0]
    )
    assert "too few base images to tell at this reward_scale" in said[3]
    assert all("base images gains as much" in text for text in said)


def test_without_a_known_run_nothing_is_said_of_a_tilt(file):
    assert "tilt" not in file.read_text()


def test_the_plane_has_the_curves_of_each_reward_that_was_aimed_at_once(tilted, tilted_page):
    charts = cost_figures(tilted_page.read_text())
    legends = [re.findall(r">((?:the tilt|best of n|aimed at)[^<]*)</text>", chart) for chart in charts]
    by_path_kl = ["path KL from the base" in chart for chart in charts]
    assert by_path_kl == [False, False, True, True]
    names = ("share0.5, share3, share0.6", "share0.4")
    expected = [f"{what} ({of})" for of in names for what in ("the tilt", "best of n", "aimed at")]
    assert legends[0] == []
    assert [sorted(legend) for legend in legends[2:]] == [sorted(expected)] * 2
    single = replace(tilted, targets={name: tilted.targets["share0.5"] for name in tilted.targets})
    charts = cost_figures(report(single, tilted.folder / "single.html", max_prompts=1).read_text())
    legends = [re.findall(r">((?:the tilt|best of n|aimed at)[^<]*)</text>", chart) for chart in charts]
    assert legends[2:] == [["the tilt", "best of n", "aimed at"]] * 2


@pytest.mark.parametrize("width", [1280, 420])
def test_the_comparison_with_the_tilt_fits_the_window(visit, tilted_page, width):
    page = visit(tilted_page, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("nav a", has_text="Against the tilt").click()
    assert page.locator("#tilt").is_visible()
    assert page.evaluate(OUTSIDE) == []


def test_a_curve_ends_where_the_figure_does_between_its_points():
    curve = Curve([0.0, 1.0, 4.0], {"r": [0.0, 2.0, 3.5]})
    for end, expected in ((2.0, ([0, 1, 2], [0, 2, 2.5])), (9.0, ([0, 1, 4], [0, 2, 3.5]))):
        kl, gains = until(curve, "r", end)
        assert (kl.tolist(), gains.tolist()) == expected


@pytest.mark.parametrize("number", [FEWEST_PROMPTS - 1, FEWEST_PROMPTS])
def test_too_few_prompts_are_called_that(tmp_path, number):
    """The Wilcoxon test of them can't be significant, however clear the difference."""
    shape = (number, 2)
    clear = compare(np.random.default_rng(0).normal(size=shape), 9 + np.random.default_rng(1).random(shape))
    assert clear.significant == (number >= FEWEST_PROMPTS)
    assert verdict(clear) == ("better" if number >= FEWEST_PROMPTS else "too few prompts")
    few = synthetic_results(tmp_path, PROMPTS[1 : 1 + number], candidates())
    text = words(report(few, tmp_path / "report.html").read_text())
    assert ("too few prompts to tell by pickscore, hpsv2." in text) == (number < FEWEST_PROMPTS)


@pytest.mark.parametrize(
    ("scales", "rewards", "number"), [((1.0,), 1, 1), ((1.0,), 2, 2), ((0.5, 1.0), 2, 4)]
)
def test_several_comparisons_are_said_not_to_be_corrected(tmp_path, scales, rewards, number):
    found = synthetic_results(tmp_path, PROMPTS, candidates(scales))
    scores = {key: {name: of[name] for name in REWARDS[:rewards]} for key, of in found.scores.items()}
    text = words(report(replace(found, scores=scores), tmp_path / "report.html").read_text())
    assert (f"Not corrected for the {number} comparisons:" in text) == (number > 1)
    assert text.count("Not corrected") == (number > 1)


def test_secrets_in_settings_notes_and_paths_are_redacted(tmp_path):
    secret = "hf_" + "a" * 30
    results = synthetic_results(tmp_path, ["a fox", "an owl"], candidates(scales=(0.5, 1.0)))
    named = tuple(replace(each, lora=Path(secret)) if each.lora else each for each in results.candidates)
    results = replace(
        results, candidates=named, settings={**results.settings, "variant": secret}, notes=(f"see {secret}",)
    )
    page = write_report(results, summarise(results), tmp_path / "report.html").read_text("utf-8")
    assert secret not in page
    assert "see ***" in page
