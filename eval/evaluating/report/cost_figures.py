"""The figures of what a gain cost, as SVG text: gain against diversity kept and against path KL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from am_diffusers.evaluation.panel import COLOURS, GREY
from am_diffusers.evaluation.plane import BEST_OF
from am_diffusers.evaluation.statistics import Array, Estimate
from evaluating.report.figures import HEIGHT, WIDTH, shorten
from evaluating.report.svg import legend_above, panel, styled, to_svg, whiskers
from evaluating.summary.tilt import Curve

# What fits in a row of a legend.
LEGEND_LETTERS = 44
MARKERS = "oDs^vPX*"
STYLES = ("-", "-.", ":")
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


@dataclass(frozen=True)
class Plane:
    """Curves of what the base itself offers, behind the candidates that aim at tilts by the same reward.

    Attributes:
        families: the LoRAs of those candidates.
        frontier: gains of tilts of the base.
        best_of_n: gains of the best of n base images.
        aims: KL divergence, and gains by reward name, of the tilts that the candidates aimed at.
    """

    families: Sequence[str]
    frontier: Curve
    best_of_n: Curve
    aims: Sequence[tuple[float, Mapping[str, float]]]

    @property
    def curves(self) -> tuple[Curve, Curve]:
        """Frontier and best-of-n."""
        return self.frontier, self.best_of_n

    def joined(self, other: "Plane") -> "Plane":
        """Return the plane of the candidates of both, which have the same curves."""
        families = dict.fromkeys([*self.families, *other.families])
        aims = [*self.aims, *(aim for aim in other.aims if aim not in self.aims)]
        return replace(self, families=list(families), aims=aims)


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


def gain_against_path_kl(
    reward: str, base: str, points: Sequence[Point], planes: Sequence[Plane] = ()
) -> str:
    """Draw gain against path KL, the base at (0, 0), with what tilts and best-of-n would gain.

    Args:
        reward: name of the reward.
        base: label of the base, which has the sampler of all points.
        points: points of the candidates compared with it that have a path KL.
        planes: what that base offers.

    Returns:
        An `<svg>` element.
    """
    with styled():
        figure, axes = panel(WIDTH, HEIGHT)
        _cost_points(axes, points, origin=0, base=base)
        _offers(axes, [plane for plane in planes if reward in plane.frontier.gains], reward)
        axes.set(xlabel="path KL from the base (nats)", ylabel=f"gain in {reward} (base sd)")
        axes.set_xlim(left=-0.05 * axes.get_xlim()[1])
        _number(figure, axes, points, origin=0)
        legend_above(figure)
        return to_svg(figure, f"{reward}: gain over {base} against path KL")


def _offers(axes: Axes, planes: Sequence[Plane], reward: str) -> None:
    """Draw frontier, aims and best-of-n, as far to the right as the candidates or their aims are."""
    end = max([axes.get_xlim()[1], *(1.1 * kl for plane in planes for kl, _ in plane.aims)])
    for place, plane in enumerate(planes):
        style, name = STYLES[place % len(STYLES)], ""
        if len(planes) > 1:
            name = f" ({shorten(', '.join(plane.families))})"
        best = until(plane.best_of_n, reward, end)
        axes.plot(*until(plane.frontier, reward, end), style, color=GREY, label=f"the tilt{name}", zorder=1)
        axes.plot(*best, "--", color=BEST_OF, label=f"best of n{name}", zorder=1)
        if plane.aims:
            kl, gains = zip(*((kl, gains[reward]) for kl, gains in plane.aims), strict=True)
            axes.plot(kl, gains, "o", color=GREY, markerfacecolor="white", label=f"aimed at{name}")


def until(curve: Curve, reward: str, end: float) -> tuple[Array, Array]:
    """Return the points of a curve up to a KL divergence, the last one on the way to the next."""
    kl, gains = np.array(curve.kl), np.array(curve.gains[reward])
    end = min(end, kl[-1])
    stops = np.append(kl[kl < end], end)
    return stops, np.interp(stops, kl, gains)


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
