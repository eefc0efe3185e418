"""The comparison table and its exports, and the leaderboard over a folder of evaluations."""

import csv
import io
import logging
import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

import leaderboard
from evaluating.summary.summarising import summarise
from evaluating.summary.summary import write_summary
from evaluating.tables.leaderboard import (
    choose_reward,
    find_evaluations,
    leaderboard_table,
    leaderboard_tables,
    to_rows,
)
from evaluating.tables.renderings import Cell, Table, to_html, to_latex, to_markdown, to_page
from evaluating.tables.tables import (
    comparison_rows,
    comparison_table,
    in_order,
    label,
    number,
    to_csv,
    write_tables,
)
from evaluation_results import BASE_20, SETTINGS, SHIFTS, STRONG, WEAK, make_results, make_tilted

NASTY = Table(
    ("mo|del", "n_1 & <b>"),
    1,
    ((Cell("a_b|*c*"), Cell("-0.58", best=True, significant=True)), (Cell("50% \\x{}~^#$"), Cell("-"))),
    ("5 % of\nthem",),
)


@pytest.fixture(scope="module")
def summary():
    return summarise(make_results(), resamples=999)


def column(table, title):
    return [row[table.titles.index(title)] for row in table.rows]


def test_columns_are_in_the_order_of_published_tables_with_their_decimals(summary):
    assert in_order(["ocr", "image_reward", "hpsv2", "clip_score", "pickscore", "aesthetic"]) == [
        "pickscore",
        "clip_score",
        "hpsv2",
        "aesthetic",
        "image_reward",
        "ocr",
    ]
    table = comparison_table(summary)
    assert table.titles == ("model", "PickScore", "HPSv2", "diversity (clip)", "path KL")
    scores = [each.scores["pickscore"].value for each in summary.candidates]
    assert [cell.text for cell in column(table, "PickScore")] == [f"{score:.2f}" for score in scores]
    assert all(re.fullmatch(r"0\.\d{3}", cell.text) for cell in column(table, "HPSv2"))
    assert [cell.text for cell in column(table, "path KL")] == ["-", "0.90", "3.00"]


def test_best_is_bold_and_a_significant_difference_is_marked(summary):
    table = comparison_table(summary)
    assert [cell.best for cell in column(table, "PickScore")] == [False, False, True]
    assert [cell.significant for cell in column(table, "PickScore")] == [False, True, True]
    # 0.280 for all: they print alike.
    assert [cell.best for cell in column(table, "HPSv2")] == [True, True, True]
    assert not any(cell.significant for cell in column(table, "HPSv2"))


@pytest.mark.parametrize(("number", "said"), [(5, True), (6, False)])
def test_too_few_prompts_for_a_star_are_pointed_out(number, said):
    table = comparison_table(summarise(make_results(num_prompts=number), resamples=99))
    assert any("too few for a star" in note for note in table.notes) == said
    assert any(cell.significant for cell in column(table, "PickScore")) != said


def test_rows_are_named_by_what_tells_them_apart(summary):
    assert [row[0].text for row in comparison_table(summary).rows] == [
        "base",
        "lora, scale 0.5",
        "lora, scale 1",
    ]
    base, weak, _ = summary.candidates
    assert label(weak, [base, weak]) == "lora"
    other = replace(weak, num_inference_steps=4, guidance_scale=4.5)
    assert label(other, [base, weak, other]) == "lora, 4 steps, guidance 4.5"


def test_numbers_are_printed_without_a_negative_zero():
    assert [number(value, 2) for value in (-0.001, 0.125001, -1.5, None)] == ["0.00", "0.13", "-1.50", "-"]


def test_csv_has_every_comparison_in_full(summary):
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison_rows(summary)))))
    assert len(rows) == 2 * 2 * 3
    row = next(
        r for r in rows if (r["lora_scale"], r["reward"], r["category"]) == ("1.0", "pickscore", "thing")
    )
    against = summary.candidates[2].against_base
    expected = against.rewards["pickscore"].categories["kind"]["thing"]
    assert float(row["gain"]) == expected.gain.value
    assert float(row["gain_low"]) == expected.gain.low
    assert float(row["p_value"]) == expected.p_value
    assert (row["category_column"], row["num_prompts"], row["significant"]) == ("kind", "8", "True")


def test_distances_from_the_tilt_are_columns_where_any_model_has_them(summary):
    tilted = summarise(make_tilted(), resamples=99)
    table, found = comparison_table(tilted), tilted.candidates[1].against_base.tilt.certificate
    titles = {
        "tilt gap": "tilt_gap",
        "attained": "attained",
        "excess KL": "excess_kl",
        "best of n": "best_of_n",
    }
    assert table.titles[-4:] == tuple(titles)
    for title, name in titles.items():
        assert [cell.text for cell in column(table, title)] == ["-", number(found[name].value, 2)]
    assert not set(titles) & set(comparison_table(summary).titles)
    unknown = comparison_table(summarise(make_tilted(images=4), resamples=99))
    assert set(titles) & set(unknown.titles) <= {"excess KL", "best of n"}


def test_csv_has_the_gains_of_the_tilt_for_all_prompts():
    summary = summarise(make_tilted(1.5), resamples=99)
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison_rows(summary)))))
    tilt = summary.candidates[1].against_base.tilt
    for row in rows:
        predicted = tilt.predicted[row["reward"]]
        expected = (
            [predicted.value, predicted.low, predicted.high, True] if row["category"] == "all" else [""] * 4
        )
        names = ("predicted_gain", "predicted_gain_low", "predicted_gain_high", "over_optimised")
        assert [row[name] for name in names] == [str(each) for each in expected]
    unknown = comparison_rows(summarise(make_tilted(images=4), resamples=9))[0]
    assert (unknown["predicted_gain"], unknown["over_optimised"]) == (None, None)


def test_csv_of_one_prompt_leaves_intervals_empty():
    rows = comparison_rows(summarise(make_results(num_prompts=1, images=1)))
    row = next(csv.DictReader(io.StringIO(to_csv(rows))))
    assert (row["gain"], row["gain_low"], row["difference_low"], row["win_rate_high"]) == ("", "", "", "")
    assert float(row["difference"]) == rows[0]["difference"]


def test_markdown_shows_names_as_they_are():
    tokens = MarkdownIt("commonmark").enable("table").parse(to_markdown(NASTY))
    texts = ["".join(child.content for child in t.children) for t in tokens if t.type == "inline"]
    assert texts == ["mo|del", "n_1 & <b>", "a_b|*c*", "-0.58*", "50% \\x{}~^#$", "-", "5 % of them"]
    bold = [t for t in tokens if t.type == "inline" and any(c.type == "strong_open" for c in t.children)]
    assert [token.content for token in bold] == ["**-0.58**\\*"]


def test_latex_is_escaped_and_uses_booktabs():
    lines = to_latex(NASTY).splitlines()
    assert lines == [
        "% 5 % of them",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"mo|del & n\_1 \& <b> \\",
        r"\midrule",
        r"a\_b|*c* & \textbf{$-$0.58}$^{*}$ \\",
        r"50\% \textbackslash{}x\{\}\textasciitilde{}\textasciicircum{}\#\$ & $-$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_number_with_its_interval_is_not_escaped():
    table = Table(("gain",), 0, ((Cell("-0.12 [-0.30, 0.01]", significant=True),),))
    assert "| -0.12 [-0.30, 0.01]\\* |" in to_markdown(table)
    assert "$-$0.12 [$-$0.30, 0.01]$^{*}$" in to_latex(table)


def test_html_is_escaped_and_loads_nothing():
    assert "<b>-0.58</b>*" in to_html(NASTY)
    assert "n_1 &amp; &lt;b&gt;" in to_html(NASTY)
    page = to_page([NASTY], "<Title>")
    assert "&lt;Title&gt;" in page
    assert "http" not in page


def test_row_with_other_number_of_cells_is_an_error():
    with pytest.raises(ValueError, match="2 titles"):
        Table(("a", "b"), 1, ((Cell("x"),),))


def test_three_files_are_written(summary, tmp_path):
    write_tables(summary, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"comparison.md", "comparison.tex", "comparison.csv"}
    assert "24 prompts x 4 images" in (tmp_path / "comparison.md").read_text()


# The leaderboard.


def save(folder, **options):
    folder.mkdir(parents=True)
    write_summary(summarise(make_results(**options), resamples=99), folder / "summary.json")


@pytest.fixture
def runs(tmp_path):
    """Two comparable evaluations, one at another seed and a broken file."""
    save(tmp_path / "a")
    save(tmp_path / "deep" / "b", shifts=SHIFTS | {WEAK.key: 2.0, STRONG.key: -1.0})
    save(tmp_path / "c", settings=SETTINGS | {"seed": 7}, seed=1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    return tmp_path


def test_models_are_sorted_by_gain_with_each_base_once_at_the_end(runs):
    evaluations = [each for each in find_evaluations(runs) if each.name != "c"]
    table = leaderboard_table(evaluations, "pickscore")
    models = [(row[0].text, row[1].text) for row in table.rows]
    assert models == [
        ("lora, scale 0.5", "deep/b"),
        ("lora, scale 1", "a"),
        ("lora, scale 0.5", "a"),
        ("lora, scale 1", "deep/b"),
        ("base", "a"),
    ]
    gains = [float(cell.text.split()[0]) for cell in column(table, "gain in pickscore (base sd)")[:4]]
    assert gains == sorted(gains, reverse=True)
    assert gains[3] < 0
    by_other = leaderboard_table(evaluations, "hpsv2")
    assert [row[:2] for row in by_other.rows[:4]] != [row[:2] for row in table.rows[:4]]


def test_evaluations_made_otherwise_are_not_mixed_and_the_tables_say_why(runs):
    tables = leaderboard_tables(find_evaluations(runs), "pickscore")
    assert [{row[1].text for row in table.rows} for table in tables] == [{"a", "deep/b"}, {"c"}]
    assert all("differ in seed." in table.notes[0] for table in tables)
    assert ["seed 0" in tables[0].notes[1], "seed 7" in tables[1].notes[1]] == [True, True]


def test_base_pictures_scored_otherwise_are_pointed_out(runs):
    other = make_results()
    scores = {key: each | {"hpsv2": each["hpsv2"] + 1} for key, each in other.scores.items()}
    save(runs / "d", scores=scores)
    tables = leaderboard_tables(find_evaluations(runs), "pickscore")
    found = [note.split(":")[0] for note in tables[0].notes if "differently" in note]
    assert found == ["The base images score differently in hpsv2 in a and d"]
    assert not any("differently" in note for note in tables[1].notes)


def test_checksum_and_counts_of_prompts_are_said_once(tmp_path):
    own = {"prompts": "0badc0de", "num_prompts": 24, "num_images_per_prompt": 4, "variant": None}
    save(tmp_path / "a", settings=SETTINGS | own | {"prompt_source": "drawbench"})
    (table,) = leaderboard_tables(find_evaluations(tmp_path), "pickscore")
    note = table.notes[0]
    assert re.match(
        r"prompts 24 \([0-9a-f]{8}\), prompts from drawbench, images per prompt 4, pretrained", note
    )
    assert not any(text in note for text in ("0badc0de", "num_", "prompt_source", "variant"))


def test_same_prompts_from_another_place_are_the_same_prompts(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, settings=SETTINGS | {"prompt_source": f"{name}.txt"})
    save(tmp_path / "c", settings=SETTINGS | {"prompt_source": "c.txt", "seed": 7})
    tables = leaderboard_tables(find_evaluations(tmp_path), "pickscore")
    assert [{row[1].text for row in table.rows} for table in tables] == [{"a", "b"}, {"c"}]
    assert "differ in seed." in tables[0].notes[0]


def test_scores_by_other_reward_weights_are_in_another_table(tmp_path):
    save(tmp_path / "a", reward_models={"pickscore": "v1", "hpsv2": "h"})
    save(tmp_path / "b", reward_models={"pickscore": "v2", "hpsv2": "h"})
    save(tmp_path / "c", reward_models={"hpsv2": "h"})
    evaluations = find_evaluations(tmp_path)
    tables = leaderboard_tables(evaluations, "pickscore")
    assert [{row[1].text for row in table.rows} for table in tables] == [{"a", "c"}, {"b"}]
    assert all("differ in pickscore weights." in table.notes[0] for table in tables)
    weights = ["pickscore weights v1, hpsv2 weights h", "pickscore weights v2, hpsv2 weights h"]
    assert [text in table.notes[1] for text, table in zip(weights, tables, strict=True)] == [True, True]
    assert [any(cell.best for cell in column(table, "PickScore")) for table in tables] == [True, True]
    assert {(row["evaluation"], row["table"]) for row in to_rows(evaluations)} == {
        ("a", 1),
        ("b", 2),
        ("c", 1),
    }


def test_base_has_the_scores_of_all_evaluations(tmp_path):
    for name, rewards in (("a", ["hpsv2"]), ("b", ["hpsv2"]), ("c", ["pickscore"])):
        scores = {key: {r: of[r] for r in rewards} for key, of in make_results().scores.items()}
        save(tmp_path / name, scores=scores, features={})
    save(tmp_path / "d", scores={key: {"hpsv2": of["hpsv2"]} for key, of in make_results().scores.items()})
    (table,) = leaderboard_tables(find_evaluations(tmp_path), "hpsv2")
    base = dict(zip(table.titles, table.rows[-1], strict=True))
    assert (base["model"].text, base["evaluation"].text) == ("base", "a, c, d")
    means = {name: make_results().scores[BASE_20.key][name].mean() for name in ("hpsv2", "pickscore")}
    assert base["HPSv2"].text == f"{means['hpsv2']:.3f}"
    assert base["PickScore"].text == f"{means['pickscore']:.2f}"
    assert re.fullmatch(r"\d\.\d{3}", base["diversity (clip)"].text)


def test_broken_summary_is_named_and_skipped(runs, caplog):
    with caplog.at_level(logging.WARNING):
        assert [each.name for each in find_evaluations(runs)] == ["a", "c", "deep/b"]
    assert [record.message.split()[1] for record in caplog.records] == [str(runs / "broken" / "summary.json")]


def test_reward_is_chosen_in_the_order_of_tables_or_must_be_known(runs):
    evaluations = find_evaluations(runs)
    assert choose_reward(evaluations, None) == "pickscore"
    assert choose_reward(evaluations, "hpsv2") == "hpsv2"
    with pytest.raises(ValueError, match="expected one of pickscore, hpsv2"):
        choose_reward(evaluations, "ocr")


def test_command_prints_markdown_and_writes_what_is_asked_for(runs, capsys):
    files = {suffix: runs / f"board.{suffix}" for suffix in ("csv", "html", "tex")}
    flags = [str(part) for suffix, file in files.items() for part in (f"--{suffix}", file)]
    leaderboard.main([str(runs), "--sort_by", "hpsv2", *flags])
    printed = capsys.readouterr().out
    assert printed.count("| model | evaluation | gain in hpsv2 (base sd) |") == 2
    assert len(list(csv.DictReader(files["csv"].open()))) == 3 * 12
    assert files["html"].read_text().count("<table>") == 2
    assert files["tex"].read_text().count(r"\begin{tabular}") == 2


def test_folder_without_evaluations_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"error: no readable summary\.json"):
        leaderboard.main([str(tmp_path)])
