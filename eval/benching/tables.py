"""The tables of docs/methods.md, from records."""

from collections.abc import Sequence

import numpy as np

from am_diffusers.comparison import Estimate, estimate
from benching.curves import Curve, Point, difference
from benching.records import Record

NONE = "-"


def rows(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def tried_table(records: Sequence[Record], mark: str, chosen: Sequence[str]) -> str:
    """What each declared setting reached on the first seed; the chosen ones bold."""
    cells = []
    for record in records:
        found = record.at(mark)
        name = f"**{record.setting}**" if record.setting in chosen else record.setting
        cells.append(
            [name, f"{found.iterations}", _sign(found.gain("trained")), _sign(found.gain("held-out"))]
        )
    return rows(["setting", "iterations", "trained", "held-out"], cells)


def budget_table(curves: Sequence[Curve], mark: str, *, timed: bool) -> str:
    """Every setting at one mark, best held-out gain first; seconds if runs were timed on a quiet machine."""
    names = list(curves[0].points[0].gains)
    cells = []
    for curve in sorted(curves, key=lambda curve: -curve.at(mark).gain("held-out")):
        point = curve.at(mark)
        low, high = curve.spread[mark]
        gains = [_interval(estimate(np.mean, point.gains[name])) for name in names]
        trained = f"{_sign(low)} to {_sign(high)}"
        cells.append(
            [curve.setting, str(curve.seeds), *_spent(point)[not timed :], *gains, trained, *_cost(point)]
        )
    header = ["setting", "seeds", *["s", "iterations", "calls"][not timed :]]
    titles = [f"{name} ({curves[0].points[0].roles[name]})" for name in names]
    return rows([*header, *titles, "trained, seeds", "diversity", "Frechet"], cells)


def equal_reward_table(reference: Curve, others: Sequence[Curve], *, timed: bool) -> str:
    """Each setting beside the reference, where both have the highest trained gain that both reach."""
    cells = []
    for curve in others:
        level = min(reference.best, curve.best)
        ours, theirs = reference.where(level), curve.where(level)
        if ours is None or theirs is None:
            cells.append([curve.setting, _sign(level), *[NONE] * (7 if timed else 6)])
            continue
        ratios = [f"{theirs.seconds / ours.seconds:.2f}", f"{theirs.calls / ours.calls:.2f}"]
        cells.append(
            [
                curve.setting,
                _sign(level),
                _sign(ours.gain("held-out")),
                _sign(theirs.gain("held-out")),
                _interval(difference(ours, theirs, "held-out")),
                f"{ours.diversity:.0%}, {theirs.diversity:.0%}",
                f"{ours.frechet:.2g}, {theirs.frechet:.2g}",
                *ratios[not timed :],
            ]
        )
    header = ["setting", "at trained gain", f"held-out of {reference.setting}", "held-out of the setting"]
    ratio = ["time, ratio", "calls, ratio"][not timed :]
    return rows([*header, "difference", "diversity of both", "Frechet of both", *ratio], cells)


def _spent(point: Point) -> list[str]:
    return [f"{point.seconds:.0f}", f"{point.iterations:.0f}", f"{point.calls:.0f}"]


def _cost(point: Point) -> list[str]:
    return [f"{point.diversity:.0%}", f"{point.frechet:.2g}"]


def _sign(value: float) -> str:
    return f"{value:+.2f}"


def _interval(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return _sign(found.value)
    return f"{_sign(found.value)} [{_sign(found.low)}, {_sign(found.high)}]"
