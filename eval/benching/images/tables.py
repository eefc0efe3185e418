"""The tables of docs/methods.md, from records."""

import math
from collections.abc import Sequence

import numpy as np

from am_diffusers.evaluation.certificate import Certificate
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.statistics import Estimate
from benching.images.certifying import certificate_of
from benching.images.curves import BASE, Curve, Place, clean_share, gain_of, right_share
from benching.images.equal_reward import at_equal_reward
from benching.images.records import Record

NONE = "-"
TILT_HEADER = (
    "setting",
    "path KL",
    "gain",
    "tilt gap",
    "attained",
    "excess KL",
    "cosine",
    "best of n",
    "clean",
    "right",
)


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


def tilt_table(curves: Sequence[Curve], mark: str, frontier: Frontier, scale: float) -> str:
    """Return the table of how near each setting is to the tilt at one mark, the nearest first.

    The tilt's own row and the base's come first; numbers that the base's images can't tell are missing.

    Args:
        curves: settings that have the mark.
        mark: name of the mark.
        frontier: scores of the base's images.
        scale: reward_scale of the tilt.
    """

    def found(curve: Curve, at: str) -> Certificate:
        return certificate_of(frontier, scale, *curve.chain[:, :, curve.marks.index(at)])

    certificates = {curve.setting: found(curve, mark) for curve in curves}
    base = found(curves[0], BASE)
    lines = [_tilt_row(frontier, scale, base), _tilt_cells("*base*", curves[0], BASE, base, frontier)]
    for curve in sorted(curves, key=lambda curve: -certificates[curve.setting].objective.value):
        lines.append(_tilt_cells(curve.setting, curve, mark, certificates[curve.setting], frontier))
    return rows(TILT_HEADER, lines)


def _tilt_row(frontier: Frontier, scale: float, base: Certificate) -> list[str]:
    """Return the cells of the tilt itself: its KL and gain."""
    if base.predicted is None:
        return ["*the tilt*", *[NONE] * (len(TILT_HEADER) - 1)]
    found = [f"{frontier.tilt(scale).kl.mean():.2f}", _interval(base.predicted.scaled(1 / _unit(frontier)))]
    return ["*the tilt*", *found, *[NONE] * (len(TILT_HEADER) - 1 - len(found))]


def _tilt_cells(name: str, curve: Curve, mark: str, found: Certificate, frontier: Frontier) -> list[str]:
    most = frontier.rewards.shape[1]
    return [
        name,
        found.path_kl.text(".2f"),
        _interval(found.gain.scaled(1 / _unit(frontier))),
        _text(found.tilt_gap, ".2f"),
        _text(found.attained, ".0%"),
        _text(found.excess_kl, ".1f"),
        _text(found.cosine, ".2f"),
        f"at least {most}" if round(found.best_of_n.value, 1) >= most else found.best_of_n.text(".1f"),
        clean_share(curve, mark).text(".0%"),
        _text(right_share(curve, mark), ".0%"),
    ]


def _unit(frontier: Frontier) -> float:
    """Return the standard deviation of the base's images."""
    return float(frontier.rewards.std())


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


def _text(found: Estimate | None, form: str) -> str:
    return NONE if found is None else found.text(form)


def _ratio(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
