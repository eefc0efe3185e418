"""The figures of scores in the report, as SVG text: distributions, and gains by category.

One small panel a figure, so that the page can place them side by side on a wide screen and below each other
on a narrow one.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from am_diffusers.evaluation.panel import COLOURS, GREY
from am_diffusers.evaluation.statistics import Array, Estimate
from evaluating.report.numbers import plain
from evaluating.report.svg import legend_above, panel, styled, to_svg, whiskers

WIDTH, HEIGHT = 4.6, 2.85
BASE_FILL = "#b9b9b9"
MAX_BINS = 30
ROW = 0.27


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


def shorten(text: str, limit: int = 26) -> str:
    """Cut `text` in its middle to `limit` characters."""
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"
