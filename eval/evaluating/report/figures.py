"""The figures of the report, as SVG text: score distributions, gains by category, what a gain cost.

One small panel a figure, so that the page can place them side by side on a wide screen and below each other
on a narrow one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from am_diffusers.evaluation.panel import COLOURS, GREY
from am_diffusers.evaluation.statistics import Array, Estimate
from evaluating.report.numbers import plain
from evaluating.report.svg import legend_above, panel, styled, to_svg, whiskers

WIDTH, HEIGHT = 4.6, 2.85
# What fits in a row of a legend.
LEGEND_LETTERS = 44
BASE_FILL = "#b9b9b9"
MAX_BINS = 30
ROW = 0.27
MARKERS = "oDs^vPX*"
# Where a number can stand, seen from its marker, the nearer places first, and the room it needs; in points of
# 1/72 inch, as letters are measured.
AROUND = np.array(
    [(r * x, r * y) for r in (8, 15, 22) for y in (1, -1, 0) for x in (1, -1, 0) if (x, y) != (0, 0)]
)
ROOM = 11


@dataclass(frozen=True)
class Point:
    """One tuned candidate in a plot of what a gain cost.

    Attributes:
        number: number of the candidate in the report's table; None if it is the only one.
        family: LoRA of the candidate; points of one LoRA are joined by a line in the order given.
        cost: diversity kept (1 = the base's) or path KL (nats).
        gain: in base standard deviations.
    """

    number: int | None
    family: str
    cost: Estimate
    gain: Estimate


def distributions(reward: str, base: Array, tuned: Array) -> str:
    """Draw histograms of all base and all tuned scores, with their means.

    Args:
        reward: name of the reward.
        base: scores of any shape, in the reward's units.
        tuned: the same for the tuned images.

    Returns:
        An `<svg>` element.
    """
    with styled():
        figure, axes = panel(WIDTH, HEIGHT)
        edges = np.histogram_bin_edges(np.concatenate([base.ravel(), tuned.ravel()]), "fd")
        if len(edges) > MAX_BINS + 1:
            edges = np.linspace(edges[0], edges[-1], MAX_BINS + 1)
        bins = edges.tolist()
        axes.hist(base.ravel(), bins, color=BASE_FILL, label=f"base, mean {plain(float(base.mean()))}")
        axes.hist(
            tuned.ravel(),
            bins,
            histtype="step",
            color=COLOURS[0],
            linewidth=1.8,
            label=f"tuned, mean {plain(float(tuned.mean()))}",
        )
        axes.axvline(float(base.mean()), color=GREY, linewidth=1.2, linestyle=":")
        axes.axvline(float(tuned.mean()), color=COLOURS[0], linewidth=1.2, linestyle=":")
        axes.set(xlabel=f"{reward} score", ylabel="images")
        axes.set_ylim(top=1.05 * axes.get_ylim()[1])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        legend_above(figure)
        return to_svg(figure, f"{reward}: how many images got which score, base and tuned")


def category_gains(reward: str, names: Sequence[str], gains: Sequence[Estimate]) -> str:
    """Draw gains with their intervals, a row per category.

    Args:
        reward: name of the reward.
        names: names of the categories, with the number of prompts, top row first.
        gains: gains of the categories, in base standard deviations.

    Returns:
        An `<svg>` element.
    """
    with styled():
        figure, axes = panel(WIDTH, 0.9 + ROW * len(names))
        rows = np.arange(len(names))
        values = np.array([gain.value for gain in gains])
        axes.axvline(0, color=GREY, linewidth=1)
        axes.errorbar(values, rows, xerr=whiskers(gains), fmt="o", color=COLOURS[0], capsize=3, markersize=5)
        axes.set_xlim(_readable_limits(gains))
        axes.set_yticks(rows, [shorten(name) for name in names])
        axes.set(xlabel=f"gain in {reward} (base sd)", ylim=(len(names) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        return to_svg(figure, f"{reward}: gain and 95 % interval by category")


def _readable_limits(gains: Sequence[Estimate]) -> tuple[float, float]:
    """Return limits for all values and intervals of ordinary width, not for the wide ones of two prompts."""
    ends = [(gain.low, gain.high) for gain in gains if gain.low is not None and gain.high is not None]
    widest = 3 * float(np.median([high - low for low, high in ends])) if ends else 0.0
    usual = [end for pair in ends if pair[1] - pair[0] <= widest for end in pair]
    seen = [0.0, *(gain.value for gain in gains), *usual]
    margin = 0.05 * (max(seen) - min(seen)) or 1.0
    return min(seen) - margin, max(seen) + margin


def gain_against_diversity(reward: str, base: str, points: Sequence[Point]) -> str:
    """Draw gain against diversity kept, with the base and the front that no candidate beats in both.

    Args:
        reward: name of the reward.
        base: label of the base that the gains and diversities are relative to.
        points: points of the candidates compared with it.

    Returns:
        An `<svg>` element.
    """
    with styled():
        figure, axes = panel(WIDTH, HEIGHT)
        _front(axes, points)
        shown = [_in_percent(point) for point in points]
        _cost_points(axes, shown, origin=100, base=base)
        _number(figure, axes, shown, origin=100)
        axes.set(xlabel="diversity kept (% of the base's)", ylabel=f"gain in {reward} (base sd)")
        legend_above(figure)
        return to_svg(figure, f"{reward}: gain over {base} against diversity kept")


def gain_against_path_kl(reward: str, base: str, points: Sequence[Point]) -> str:
    """Draw gain against path KL, the base at (0, 0).

    Args:
        reward: name of the reward.
        base: label of the base, which has the sampler of all points.
        points: points of the candidates compared with it that have a path KL.

    Returns:
        An `<svg>` element.
    """
    with styled():
        figure, axes = panel(WIDTH, HEIGHT)
        _cost_points(axes, points, origin=0, base=base)
        axes.set(xlabel="path KL from the base (nats)", ylabel=f"gain in {reward} (base sd)")
        axes.set_xlim(left=-0.05 * axes.get_xlim()[1])
        _number(figure, axes, points, origin=0)
        legend_above(figure)
        return to_svg(figure, f"{reward}: gain over {base} against path KL")


def shorten(text: str, limit: int = 26) -> str:
    """Cut `text` in its middle to `limit` characters."""
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one reaches in one coordinate and beats in the other, left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _front(axes: Axes, points: Sequence[Point]) -> None:
    front = pareto_front([(1.0, 0.0), *((point.cost.value, point.gain.value) for point in points)])
    if len(front) > 1:
        kept, gains = zip(*front, strict=True)
        axes.plot([100 * share for share in kept], gains, "--", color=GREY, linewidth=1, zorder=1)


def _in_percent(point: Point) -> Point:
    return replace(point, cost=point.cost.scaled(100))


def _cost_points(axes: Axes, points: Sequence[Point], *, origin: float, base: str) -> None:
    """Draw every candidate with both intervals and its number, and the base at (`origin`, 0)."""
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.plot([origin], [0], "x", color="black", markersize=8, markeredgewidth=2, label=base, zorder=3)
    families = list(dict.fromkeys(point.family for point in points))
    for place, family in enumerate(families):
        members = [point for point in points if point.family == family]
        colour = COLOURS[place % len(COLOURS)]
        costs, gains = [[getattr(p, axis).value for p in members] for axis in ("cost", "gain")]
        axes.errorbar(
            costs,
            gains,
            xerr=whiskers([point.cost for point in members]),
            yerr=whiskers([point.gain for point in members]),
            fmt=f"{MARKERS[place % len(MARKERS)]}-",
            color=colour,
            ecolor=to_rgba(colour, 0.45),
            linewidth=1.2,
            label=shorten(family, LEGEND_LETTERS),
        )
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))


def _number(figure: Figure, axes: Axes, points: Sequence[Point], *, origin: float) -> None:
    """Write each candidate's number beside its marker, as near as markers and other numbers leave room."""
    places = [(point.cost.value, point.gain.value) for point in points]
    axes.autoscale_view()  # matplotlib puts it off, and without it places are not where they will be
    inches = axes.transData.transform([*places, (origin, 0)]) / figure.dpi
    taken = list(72 * inches)
    for point, place, marker in zip(points, places, taken[: len(points)], strict=True):
        if point.number is None:
            continue
        others = np.array([each for each in taken if each is not marker])
        rooms = [np.hypot(*(others - marker - step).T).min() for step in AROUND]
        # The first of those with enough, else the one with most.
        step = AROUND[int(np.argmax(np.minimum(rooms, ROOM)))]
        taken.append(marker + step)
        axes.annotate(
            f"{point.number}",
            place,
            step,
            textcoords="offset points",
            weight="bold",
            ha="center",
            va="center",
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )
