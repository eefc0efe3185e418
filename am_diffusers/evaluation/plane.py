"""The plane of KL and reward: the way of a run, under the frontier that no law can pass, beside best-of-n."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from am_diffusers.evaluation.frontier import Frontier, best_of_kl

WAY, BEST_OF, GREY = "#0072B2", "#E69F00", "#555555"


def draw_plane(axes: Axes, validation: Sequence[Mapping[str, float]], frontier: Frontier | None) -> None:
    """Draw the path KL and gain of each validation, with the frontier and best-of-n as curves.

    Args:
        axes: where to draw.
        validation: lines of validation.jsonl.
        frontier: scores of base images; None = there are none.
    """
    axes.set_title("Reward against KL, and the most there is", loc="left")
    points = [line for line in validation if "validation/gain_low" in line]
    if frontier is None or not points:
        axes.set(xticks=[], yticks=[], xlabel="KL from the base (nats)", ylabel="gain (base sd)")
        axes.text(
            0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", va="center", color=GREY
        )
        return
    unit = frontier.rewards.std()
    draw_frontier(axes, frontier)
    kl, gain = (np.array([line[f"validation/{name}"] for line in points]) for name in ("path_kl", "gain"))
    low, high = (np.array([line[f"validation/gain_{end}"] for line in points]) for end in ("low", "high"))
    axes.plot(kl, gain / unit, "-o", color=WAY, markersize=4, label="this run")
    axes.errorbar(
        kl[-1:], gain[-1:] / unit, np.abs(np.stack([gain - low, high - gain])[:, -1:]) / unit, color=WAY
    )
    axes.set_xlim(-0.03 * max(kl.max(), 1), 1.1 * max(kl.max(), 1))
    axes.legend(loc="best")


def draw_frontier(axes: Axes, frontier: Frontier) -> None:
    """Draw the frontier and best-of-n, gains in base standard deviations."""
    unit, base = frontier.rewards.std(), frontier.rewards.mean()
    tilts, counts = frontier.curve, np.arange(1, frontier.rewards.shape[1] + 1)
    axes.plot(
        [0, *(each.kl.mean() for each in tilts)],
        [0, *((each.reward.mean() - base) / unit for each in tilts)],
        color=GREY,
        label="the tilt",
    )
    axes.plot(
        [best_of_kl(count) for count in counts],
        (frontier.best.mean(axis=0) - base) / unit,
        "--",
        color=BEST_OF,
        label="best of n",
    )
    axes.set_xlabel("KL from the base (nats)")
    axes.set_ylabel("gain (base sd)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
