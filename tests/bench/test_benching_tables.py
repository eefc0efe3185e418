"""The benchmark of methods: places of equal reward, intervals, tables, figures, the page."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from am_diffusers.system.text import replace_table
from bench_records import curve, made_up, put_base_scores, record, study
from benching.images.certifying import certificate_of, read_frontier
from benching.images.curves import clean_share, make_curve, right_share, where
from benching.images.equal_reward import at_equal_reward
from benching.images.figures import draw, draw_ways
from benching.images.page import reference_of, tables, write_page
from benching.images.records import record_file, write_record
from benching.images.sheet import draw_sheet, images_of
from benching.images.study import Elsewhere, read_study
from benching.images.tables import budget_table, equal_reward_table, tilt_table, tried_table
from benching.images.work import Work

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "eval/benching").glob("*.yaml"))


def test_places_of_equal_trained_reward_are_found_between_marks(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    fast, slow = curve(work, "a", (0.8, 0.4)), curve(work, "b", (0.2, 0.02))
    at = where(fast.places(), 0.2)
    assert at is not None
    # A quarter of the way, which is linear all along.
    assert at == pytest.approx((0.2, 0.1, 5, 25, 5, 0.98, 0.002))
    assert where(slow.places(), 0.21) is None
    assert fast.at("base") == pytest.approx((0, 0, 0, 0, 0, 1, 0))
    found = at_equal_reward(fast, slow)
    assert found is not None
    assert found.level == pytest.approx(0.9 * 0.2)
    # At 4.5 and 18 seconds.
    assert (found.reference.seconds, found.other.seconds) == pytest.approx((4.5, 18))
    assert found.difference.value == pytest.approx(0.018 - 0.09)
    assert (found.seconds.value, found.calls.value) == pytest.approx((4, 4))


def test_intervals_hold_the_noise_of_prompts_in_level_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two settings whose gains differ by noise of prompts alone: the truth is no difference, a ratio of 1."""
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    monkeypatch.setattr("benching.images.equal_reward.RESAMPLES", 400)
    rng, covered = np.random.default_rng(0), []
    for _ in range(40):
        curves = []
        for setting in ("a", "b"):
            clean = curve(work, setting, (0.5, 0.3))
            slope = np.array([0, 0.5, 1])[None, :, None]
            noisy = {
                name: np.repeat(gain.mean(axis=2, keepdims=True), 64, 2)
                + slope * rng.normal(0, 0.5, (1, 1, 64))
                for name, gain in clean.gains.items()
            }
            curves.append(dataclasses.replace(clean, gains=noisy))
        found = at_equal_reward(*curves)
        assert found is not None
        low, high = found.seconds.low, found.seconds.high
        assert low is not None
        assert high is not None
        covered.append(low <= 1 <= high)
    # 95 % of 40 are 38; fewer than 34 have a probability of 1 %.
    assert sum(covered) >= 34


def test_other_seeds_widen_the_intervals(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    reference = curve(work, "a", (0.5, 0.3), seeds=3)
    steady = curve(work, "b", (0.5, 0.3), seeds=3)
    records = [record(work, "b", (0.5, gain), seed) for seed, gain in enumerate((0.1, 0.3, 0.5))]
    widths = []
    for other in (steady, make_curve(records)):
        found = at_equal_reward(reference, other)
        assert found is not None
        assert found.difference.low is not None
        assert found.difference.high is not None
        assert found.difference.value == pytest.approx(0, abs=1e-9)
        widths.append(found.difference.high - found.difference.low)
    assert widths[0] == pytest.approx(0, abs=1e-9)
    assert widths[1] > 0.2


def test_tables_say_what_the_records_say(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    both = make_curve([record(work, "a", (0.2, 0.1), 0), record(work, "a", (0.4, 0.3), 1)])
    slow = curve(work, "b", (0.2, 0.02))
    lines = budget_table([slow, both], "20-s", timed=True).splitlines()
    assert lines[2].startswith("| a | 2 | 20 | 20 | 100 | +0.30 [+0.2")
    assert "| +0.20 to +0.40 | +0.30 | 97% | 0.0030 |" in lines[2]
    assert "| +0.20 to +0.20 | - | 98% | 0.0020 |" in lines[3]
    assert {line.count("|") for line in lines} == {12}
    for timed, bars in ((True, 10), (False, 9)):
        never = curve(work, "b", (-0.2, 0.02))
        lines = equal_reward_table(both, [slow, never], timed=timed).splitlines()
        assert {line.count("|") for line in lines} == {bars}
        assert lines[2].startswith("| b | +0.18 | +0.12 | +0.02 | -0.10 [")
        assert lines[3].startswith("| b | - |")
    failed = dataclasses.replace(record(work, "b", (0, 0)), failed="loss is nan", snapshots=[])
    tried = tried_table([record(work, "a", (0.2, 0.1)), failed], "20-s", ["a"])
    assert tried.splitlines()[2:] == ["| **a** | 20 | +0.20 | +0.10 |", "| b: loss is nan | - | - | - |"]


def test_the_tilt_table_has_the_certificate_of_the_means_over_seeds(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    put_base_scores(work)
    frontier = read_frontier(work.study, work.base_scores)
    assert frontier.rewards.mean() == pytest.approx(0)  # (score - mean) / std
    near = make_curve([record(work, "a", (gain, 0.1), seed) for seed, gain in enumerate((0.4, 0.8))])
    far = curve(work, "b", (0.2, 0.02))
    lines = tilt_table([far, near], "20-s", frontier, 1.0).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [line[0] for line in cells] == ["*the tilt*", "*base*", "a", "b"]  # the nearest first
    assert {len(line) for line in cells} == {10}
    tilt, base, ours, _ = cells
    assert tilt[1] == f"{frontier.tilt(1.0).kl.mean():.2f}"
    assert tilt[3:] == ["-"] * 7
    assert base[1:3] == ["0.00 [0.00, 0.00]", "+0.00 [+0.00, +0.00]"]
    assert (base[4], base[5], base[7]) == ("0% [0%, 0%]", "-", "1.0 [1.0, 1.0]")
    # A gain of .6 and a path KL of .4, against a headroom of about a half.
    headroom = frontier.tilt(1.0).log_normaliser.mean()
    assert ours[1].startswith("0.40 [")
    assert ours[2].startswith(f"+{0.6 / frontier.rewards.std():.2f} [")
    assert ours[3].startswith(f"{headroom - 0.2:.2f} [")
    assert ours[4].startswith(f"{0.2 / headroom:.0%} [")
    found = certificate_of(frontier, 1.0, *near.chain[:, :, near.marks.index("20-s")])
    assert found.excess_kl is not None
    assert ours[5] == found.excess_kl.text(".1f")


def test_the_tilt_table_says_what_base_images_cannot_tell(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching"}), tmp_path, tmp_path)
    put_base_scores(work)
    frontier, high = read_frontier(work.study, work.base_scores), curve(work, "a", (9.0, 0.1))
    lines = tilt_table([high], "20-s", frontier, 30.0).splitlines()
    tilt, _, ours = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert set(tilt[1:]) == {"-"}
    assert ours[3:6] == ["-", "-", "-"]
    assert ours[7] == "at least 16"


def test_shares_of_the_judge_are_of_images_not_means_of_prompts_shares(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching"}), tmp_path, tmp_path)
    made = curve(work, "a", (0.2, 0.1), seeds=2)
    assert clean_share(made, "base").value == 0.5
    assert clean_share(made, "20-s").value == pytest.approx(0.5)
    right = [right_share(made, mark) for mark in ("base", "20-s")]
    assert [each and each.value for each in right] == pytest.approx([1, 0.9])  # a prompt has no clean image
    none = dataclasses.replace(made, judged=0 * made.judged)
    assert right_share(none, "20-s") is None


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_page_has_the_tables_of_the_committed_records(file: Path) -> None:
    page = (ROOT / "docs/methods.md").read_text()
    for name, table in tables(file.stem, Work.of(file.stem, ROOT / "outputs")).items():
        assert replace_table(page, name, table) == page, f"python eval/bench_methods.py --tables_only: {name}"


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_page_has_a_place_for_every_table_of_a_study(file: Path, tmp_path: Path) -> None:
    work = Work(read_study(file), tmp_path, tmp_path / file.stem)
    for setting in work.study.settings:
        for seed in work.study.seeds:
            write_record(made_up(work, setting, seed), record_file(work.data, setting, seed))
    with pytest.raises(ValueError, match=r"base-6-steps/certificate.json is missing"):
        tables(file.stem, work)
    put_base_scores(work)
    (tmp_path / "docs/images").mkdir(parents=True)
    page = tmp_path / "docs/methods.md"
    page.write_text((ROOT / "docs/methods.md").read_text())
    write_page(file.stem, work, page.parent)
    found = tables(file.stem, work)
    assert f"{file.stem}-{work.study.budget}-tilt" in found
    for table in found.values():
        assert table in page.read_text()
    assert (page.parent / f"images/{file.stem}.png").exists()
    assert (page.parent / f"images/{file.stem}_plane.png").exists()


def test_a_reference_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    reference = Elsewhere("discretisation", "published-k40")
    work = Work(study({"a": "adjoint_matching"}, reference=reference), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="published-k40 is no reference"):
        reference_of(work)
    mistyped = study({"a": "adjoint_matching"}, reference=Elsewhere("discretisation", "published-40"))
    with pytest.raises(ValueError, match="reference 'published-40': did you mean 'published-k40'"):
        reference_of(dataclasses.replace(work, study=mistyped))
    assert reference_of(dataclasses.replace(work, study=study({"a": "adjoint_matching"}))) == []


def test_the_figures_are_drawn_large_enough_to_read(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path, tmp_path)
    put_base_scores(work)
    curves = [curve(work, "a", (0.8, 0.4)), curve(work, "b", (0.2, 0.02))]
    draw(curves, "seconds", tmp_path / "figure.png")
    draw_ways(curves, read_frontier(work.study, work.base_scores), tmp_path / "plane.png")
    for name in ("figure", "plane"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_the_sheet_has_a_row_for_each_setting_whose_pictures_are_there(tmp_path: Path) -> None:
    work = Work(study({"a": "adjoint_matching", "b": "draft"}), tmp_path / "data", tmp_path)
    folders = {"base": "base-steps2-guidance1", "a": "a-seed0-20-s-scale1-steps2-guidance1"}
    for place, folder in enumerate(folders.values()):
        for prompt in range(20):
            file = tmp_path / "evaluation/pictures" / folder / f"{prompt:05d}-000.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (100 * place, 10 * prompt, 0)).save(file)
    found = images_of(work, ["a", "b"])
    assert list(found) == ["base", "a"]
    assert [file.name for file in found["a"]] == [f"{prompt:05d}-000.png" for prompt in range(0, 20, 2)]
    file = tmp_path / "sheet.png"
    draw_sheet(found, ["a fox on a blue background"] * 10, file)
    with Image.open(file) as image:
        colours = [colour for _, colour in image.getcolors(1 << 24) or []]
    assert {(100 * place, 20 * column, 0) for place in range(2) for column in range(10)} <= set(colours)
