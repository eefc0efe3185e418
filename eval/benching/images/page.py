"""docs/methods.md: tables and figures of the studies, from the committed records."""

from pathlib import Path

from am_diffusers.prompts.sets import load_texts
from am_diffusers.system.files import write_text
from am_diffusers.system.text import replace_table, suggest
from benching.images.certifying import read_frontier
from benching.images.curves import Curve, make_curve
from benching.images.figures import draw, draw_ways
from benching.images.sheet import draw_sheet, images_of
from benching.images.tables import budget_table, equal_reward_table, tilt_table, tried_table
from benching.images.work import Work, check_machines
from evaluating.candidates import BASE

PAGE = "methods.md"


def curves_of(work: Work) -> list[Curve]:
    """Return the curves of all settings that are compared, the first method's first."""
    return [make_curve(records) for records in work.compared().values()]


def reference_of(work: Work) -> list[Curve]:
    """Return the study's reference from elsewhere; empty if there is none, or none has been run.

    Raises:
        ValueError: there is no such setting, it was evaluated otherwise, or on another machine.
    """
    study, named = work.study, work.study.reference
    if named is None:
        return []
    other = Work.of(named.study, work.outputs.parent)
    if named.setting not in other.study.settings:
        raise ValueError(f"reference {suggest(named.setting, other.study.settings)}")
    if other.study.evaluation != study.evaluation:
        raise ValueError(
            f"{named.study} and this study evaluate differently: {named.setting} is no reference"
        )
    records = other.compared().get(named.setting)
    if records is None:
        return []
    check_machines([*records, *(each for found in work.compared().values() for each in found)])
    return [make_curve(records)]


def tables(name: str, work: Work) -> dict[str, str]:
    """Return the tables of a study by their marks; none before a setting can be compared."""
    curves, study = curves_of(work), work.study
    timed = study.timed
    if not curves:
        return {}
    elsewhere = reference_of(work)
    every = [*curves, *elsewhere]
    frontier, scale = read_frontier(study, work.base_scores), study.evaluation.certificate.reward_scale
    found: dict[str, str] = {}
    for mark in study.marks:
        if mark.name == study.budget or mark.calls is not None:
            there = [curve for curve in every if mark.name in curve.marks]
            found[f"{name}-{mark.name}"] = budget_table(there, mark.name, timed=timed)
            found[f"{name}-{mark.name}-tilt"] = tilt_table(there, mark.name, frontier, scale)
    if len(curves) > 1:
        found[f"{name}-equal-reward"] = equal_reward_table(curves[0], curves[1:], timed=timed)
    for curve in elsewhere:
        found[f"{name}-reference"] = equal_reward_table(curve, curves, timed=timed)
    if study.select == "best":
        first = [work.record(setting, study.seeds[0]) for setting in study.settings]
        known = [record for record in first if record is not None]
        chosen = [curve.setting for curve in curves]
        found[f"{name}-tried"] = tried_table(known, study.budget, chosen)
    return found


def write_page(name: str, work: Work, docs: Path) -> None:
    """Write a study's tables between their marks, draw its figures and, if its images are here, a sheet.

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
    every, images = [*curves, *reference_of(work)], docs / "images"
    draw(every, "seconds" if work.study.timed else "calls", images / f"{name}.png")
    draw_ways(every, read_frontier(work.study, work.base_scores), images / f"{name}_plane.png")
    there = images_of(work, [curve.setting for curve in curves])
    if work.study.select == "best" and len(there) == len(curves) + 1:  # the base and all others
        prompts = load_texts(work.study.evaluation.prompts)
        shown = [prompts[int(file.name.split("-")[0])] for file in there[BASE]]
        draw_sheet(there, shown, images / f"{name}_pictures.png")
