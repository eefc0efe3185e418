"""The tables of docs/methods.md, from records."""

import math
from collections.abc import Sequence

import numpy as np

from am_diffusers.evaluation.statistics import Estimate
from benching.images.curves import Curve, Place, gain_of
from benching.images.equal_reward import at_equal_reward
from benching.images.records import Record

NONE = "-"


def rows(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def tried_table(records: Sequence[Record], mark: str, chosen: Sequence[str]) -> str:
    """Return the table of what each declared setting reached on the first seed; the chosen ones bold."""
    cells = []
    for record in records:
        name = f"**{record.setting}**" if record.setting in chosen else record.setting
        if record.failed:
            cells.append([f"{name}: {record.failed}", NONE, NONE, NONE])
            continue
        found = record.at(mark)
        gains = [_sign(found.gain(role)) for role in ("trained", "held-out")]
        cells.append([name, f"{found.iterations}", *gains])
    return rows(["setting", "iterations", "trained", "held-out"], cells)


def budget_table(curves: Sequence[Curve], mark: str, *, timed: bool) -> str:
    """Return the table of all settings at one mark, best held-out gain first; with seconds if `timed`."""
    rewards = list(curves[0].roles)
    cells = []
    for curve in sorted(curves, key=lambda curve: -curve.at(mark).held_out):
        place, column = curve.at(mark), curve.marks.index(mark)
        gains = [_interval(gain_of(curve, name, mark)) for name in rewards]
        trained = curve.by_prompt("trained")[:, column].mean(axis=1)
        spread = f"{_sign(trained.min())} to {_sign(trained.max())}"
        later = curve.by_prompt("held-out")[1:, column]
        other_seeds = _sign(float(np.mean(later))) if len(later) else NONE
        cost = [f"{place.diversity:.0%}", f"{place.frechet:.4f}"]
        spent = _spent(place)[not timed :]
        cells.append([curve.setting, str(curve.seeds), *spent, *gains, spread, other_seeds, *cost])
    header = ["setting", "seeds", *["s", "iterations", "calls"][not timed :]]
    titles = [f"{name} ({curves[0].roles[name]})" for name in rewards]
    last = ["trained, range of seeds", "held-out, other seeds", "diversity", "Frechet"]
    return rows([*header, *titles, *last], cells)


def equal_reward_table(reference: Curve, others: Sequence[Curve], *, timed: bool) -> str:
    """Return the table of each setting beside the reference, where both have the same trained gain."""
    ratio = ["time, ratio", "calls, ratio"][not timed :]
    header = ["setting", "at trained gain", f"held-out of {reference.setting}", "held-out of the setting"]
    header += ["difference", "diversity of both", "Frechet of both", *ratio]
    cells = []
    for curve in others:
        found = at_equal_reward(reference, curve)
        if found is None:
            cells.append([curve.setting, *[NONE] * (len(header) - 1)])
            continue
        ours, theirs = found.reference, found.other
        cells.append(
            [
                curve.setting,
                _sign(found.level),
                _sign(ours.held_out),
                _sign(theirs.held_out),
                _interval(found.difference),
                f"{ours.diversity:.0%}, {theirs.diversity:.0%}",
                f"{ours.frechet:.4f}, {theirs.frechet:.4f}",
                *[_ratio(found.seconds), _ratio(found.calls)][not timed :],
            ]
        )
    return rows(header, cells)


def _spent(place: Place) -> list[str]:
    return [f"{place.seconds:.0f}", f"{place.iterations:.0f}", f"{place.calls:.0f}"]


def _sign(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"


def _interval(found: Estimate) -> str:
    if math.isnan(found.value):
        return NONE
    if found.low is None or found.high is None:
        return _sign(found.value)
    return f"{_sign(found.value)} [{_sign(found.low)}, {_sign(found.high)}]"


def _ratio(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
