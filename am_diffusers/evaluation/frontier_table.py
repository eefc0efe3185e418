"""The frontier in words: what each reward_scale is worth, so that a person chooses by gain and KL."""

import math
from collections.abc import Sequence

import numpy as np

from am_diffusers.evaluation.frontier import Frontier, best_of_at
from am_diffusers.evaluation.statistics import Array

LADDER = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0)
"""KL divergences, in nats, at which the frontier is printed."""
BEST_OF = "best of n"


def frontier_table(frontier: Frontier, trained: Sequence[str]) -> list[str]:
    """Return lines: a head, one for each KL of `LADDER` that the base images can tell, and what they can't.

    Gains are in standard deviations of the base's scores; best of n is what the best of as many base images
    gains for the same KL.

    Args:
        frontier: scores of base images.
        trained: names of the trained rewards; several are shown as their weighted sum, too.
    """
    number = frontier.rewards.shape[1]
    total = {"weighted sum": frontier.rewards} if len(trained) > 1 else {}
    names = [*total, *(f"{name} (trained)" if name in trained else name for name in frontier.scores)]
    rows = [["reward_scale", "KL (nats)", f"images of {number}", *names, BEST_OF]]
    end = frontier.curve[-1].kl.mean()
    rows += [_row(frontier, kl, bool(total)) for kl in LADDER if kl <= end]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [
        f"gains of tilts of the base in base sd, told by {len(frontier.rewards)} prompts x {number} images:",
        *lines,
        f"beyond reward_scale {frontier.largest_scale:.3g} (KL {end:.2f}) less than "
        f"{frontier.least_share:.0%} of the images would carry the weight: these can't tell",
    ]


def _row(frontier: Frontier, kl: float, with_total: bool) -> list[str]:
    tilted = frontier.tilt(frontier.scale_at(kl))
    gains = [_gain(tilted.reward, frontier.rewards)] if with_total else []
    gains += [_gain(tilted.scores[name], each) for name, each in frontier.scores.items()]
    effective = tilted.effective_share.mean() * frontier.rewards.shape[1]
    count = best_of_at(kl)
    best = (best_of(frontier, count) - frontier.rewards.mean()) / frontier.rewards.std()
    return [
        f"{tilted.scale:.3g}",
        f"{kl:g}",
        f"{effective:.0f}",
        *(f"{gain:+.2f}" for gain in gains),
        f"{best:+.2f} (n = {count:.1f})",
    ]


def _gain(tilted: Array, base: Array) -> float:
    """Return the mean gain over the base in standard deviations of the base's scores."""
    spread = base.std()
    return float((tilted.mean() - base.mean()) / spread) if spread > 0 else math.nan


def best_of(frontier: Frontier, count: float) -> float:
    """Return the mean reward of the best of `count` base images, which need be no whole number."""
    means: Sequence[float] = frontier.best.mean(axis=0)
    return float(np.interp(math.log(count), np.log(np.arange(1, len(means) + 1)), means))
