"""The figures of a study, one line per setting: training curves from the base, the plane of KL and gain."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.panel import COLOURS, GREY
from am_diffusers.evaluation.plane import draw_frontier
from am_diffusers.evaluation.statistics import Array
from am_diffusers.system.files import write_whole
from benching.images.curves import BASE, Curve, Place
from evaluating.report.svg import styled

MARKERS = "oDs^vPX*"
Axis = Callable[[Place], float]
Line = Sequence[float] | Array
TRAINED = "gain of the trained reward (base sd)"
HELD_OUT = "mean gain of the held-out rewards (base sd)"


def draw(curves: Sequence[Curve], spent: str, file: Path) -> None:
    """Draw four panels as PNG: what training cost against its gain, and what came with the gain.

    Args:
        curves: curves of the settings that are compared.
        spent: `seconds` or `calls`, the cost of the first panel.
        file: file to write.
    """
    with styled():
        figure = Figure(figsize=(11, 8.6), dpi=110, layout="constrained")
        axes = figure.subplots(2, 2).ravel()
        title = (
            "CPU seconds of training"
            if spent == "seconds"
            else "transformer calls, a sample each (thousands)"
        )
        unit = 1 if spent == "seconds" else 1000
        _panel(axes[0], curves, (lambda p: getattr(p, spent) / unit, _trained), (title, TRAINED))
        _panel(axes[1], curves, (_trained, lambda p: p.held_out), (TRAINED, HELD_OUT))
        diversity = "diversity kept (% of the base's)"
        _panel(axes[2], curves, (_trained, lambda p: 100 * p.diversity), (TRAINED, diversity))
        frechet = "Frechet distance to the base, less its floor"
        _panel(axes[3], curves, (_trained, lambda p: p.frechet), (TRAINED, frechet))
        low, high = axes[1].get_xlim()
        ends = np.array([max(low, axes[1].get_ylim()[0]), high])
        axes[1].plot(ends, ends, ":", color=GREY, linewidth=1, zorder=0)
        axes[1].annotate(
            "as much as the trained one",
            ends[[1, 1]],
            (-4, -16),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREY,
            fontsize=9,
        )
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        _write(figure, file)


def draw_ways(curves: Sequence[Curve], frontier: Frontier, file: Path) -> None:
    """Draw the way of each setting in the plane of path KL and trained gain as PNG, under the frontier.

    Args:
        curves: curves of the settings that are compared.
        frontier: scores of the base's images, whose tilts and best-of-n are curves.
        file: file to write.
    """
    with styled():
        figure = Figure(figsize=(9, 6.6), dpi=120, layout="constrained")
        axes, unit = figure.subplots(), frontier.rewards.std()
        draw_frontier(axes, frontier)
        for place, curve in enumerate(curves):
            gain, path_kl = curve.chain.mean(axis=(1, 3))
            _way(axes, place, curve.setting, path_kl, gain / unit)
        # From a few hundredths of a nat to hundreds: linear near 0, logarithmic beyond.
        axes.set_xscale("symlog", linthresh=0.1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=0)
        axes.set_ylabel(TRAINED)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        _write(figure, file)


def _write(figure: Figure, file: Path) -> None:
    write_whole(file, lambda part: figure.savefig(part, format="png", metadata={"Software": None}))


def _way(axes: Axes, place: int, name: str, horizontal: Line, vertical: Line) -> None:
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    style = "-" if place < len(COLOURS) else "--"
    axes.plot(horizontal, vertical, style, marker=marker, color=colour, markersize=5, label=name)


def _trained(place: Place) -> float:
    return place.trained


def _panel(axes: Axes, curves: Sequence[Curve], of: tuple[Axis, Axis], titles: tuple[str, str]) -> None:
    for place, curve in enumerate(curves):
        horizontal, vertical = ([axis(curve.at(mark)) for mark in curve.marks] for axis in of)
        _way(axes, place, curve.setting, horizontal, vertical)
    axes.set(xlabel=titles[0], ylabel=titles[1])
    axes.axhline(vertical_of_base(of[1], curves), color=GREY, linewidth=0.8, zorder=0)


def vertical_of_base(axis: Axis, curves: Sequence[Curve]) -> float:
    """Return the base's value on a vertical axis."""
    return axis(curves[0].at(BASE))
