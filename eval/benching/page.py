"""docs/methods.md: tables and figures of the studies, from the committed records."""

from pathlib import Path

from am_diffusers.command_line import asset_path
from am_diffusers.markdown import replace_table
from am_diffusers.prompts import load_prompts
from benching.curves import Curve, make_curve
from benching.figures import draw
from benching.sheet import draw_sheet, pictures_of
from benching.tables import budget_table, equal_reward_table, tried_table
from benching.work import Work
from evaluating.candidates import BASE
from evaluating.files import write_text

PAGE = "methods.md"


def curves_of(work: Work) -> list[Curve]:
    """Of all settings that are compared, the first method's first."""
    return [make_curve(records) for records in work.compared().values()]


def tables(name: str, work: Work) -> dict[str, str]:
    """The tables of a study by their marks; none before a setting can be compared."""
    curves, study = curves_of(work), work.study
    timed = study.timed
    if not curves:
        return {}
    found = {
        f"{name}-{mark.name}": budget_table(curves, mark.name, timed=timed)
        for mark in study.marks
        if mark.name == study.budget or mark.calls is not None
    }
    found[f"{name}-equal-reward"] = equal_reward_table(curves[0], curves[1:], timed=timed)
    if study.select == "best":
        first = [work.record(setting, study.seeds[0]) for setting in study.settings]
        known = [record for record in first if record is not None]
        chosen = [curve.setting for curve in curves]
        found[f"{name}-tried"] = tried_table(known, study.budget, chosen)
    return found


def write_page(name: str, work: Work, docs: Path) -> None:
    """Write a study's tables between their marks, draw its figure and, if its pictures are here, a sheet.

    Raises:
        ValueError: the page lacks the marks of a table.
    """
    page = docs / PAGE
    text = page.read_text("utf-8")
    for mark, table in tables(name, work).items():
        text = replace_table(text, mark, table)
    write_text(page, text)
    curves = curves_of(work)
    if not curves:
        return
    draw(curves, "seconds" if work.study.timed else "calls", docs / "images" / f"{name}.png")
    pictures = pictures_of(work, [curve.setting for curve in curves])
    if work.study.select == "best" and len(pictures) == len(curves) + 1:  # the base and all others
        prompts = load_prompts(asset_path(work.study.evaluation.prompts))
        shown = [prompts[int(file.name.split("-")[0])] for file in pictures[BASE]]
        draw_sheet(pictures, shown, docs / "images" / f"{name}_pictures.png")
