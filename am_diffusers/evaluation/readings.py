"""Readings of the frontier's curves at a tuned model's gain, with intervals over prompts.

What they mean is in certificate.py. Prompts are resampled, their curves averaged, and the mean curve is read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.statistics import Array, Estimate, estimate

Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class Rows:
    """Statistics of resampled prompts, whose curves are averaged before they are read.

    Attributes:
        frontier: curves of the prompts.
        resamples: number of resamples of the bootstrap.
    """

    frontier: Frontier
    resamples: int

    def estimate(self, statistic: Callable[[Numbers], Array]) -> Estimate:
        """Return a statistic that takes numbers of prompts (..., P) and reduces their last axis."""
        return estimate(
            lambda rows, axis: statistic(np.moveaxis(rows, axis, -1)),
            np.arange(len(self.frontier.rewards)),
            resamples=self.resamples,
        )

    def excess_kl(self, gain: Array, path_kl: Array) -> Estimate | None:
        """Return path KL over the frontier's KL at the same gain; both (P,)."""
        base, curve = self.frontier.rewards.mean(axis=1), self.frontier.curve
        gains = np.stack([each.reward - base for each in curve], -1)
        divergences = np.stack([each.kl for each in curve], -1)
        if not gains[:, 0].mean() < gain.mean() <= gains[:, -1].mean():
            return None

        def ratio(rows: Numbers) -> Array:
            curves = gains[rows].mean(-2), divergences[rows].mean(-2)
            return path_kl[rows].mean(-1) / _at(gain[rows].mean(-1), *curves)

        return self.estimate(ratio)

    def cosine(self, gain: Array, path_kl: Array) -> Estimate | None:
        """Return the gain over the most that a small control of this path KL could gain; both (P,)."""
        if not path_kl.mean() > 0:
            return None
        variance = self.frontier.variance

        def cosine(rows: Numbers) -> Array:
            most = np.sqrt(2 * variance[rows].mean(-1) * path_kl[rows].mean(-1))
            return gain[rows].mean(-1) / most

        return self.estimate(cosine)

    def best_of_n(self, gain: Array) -> Estimate:
        """Return the number of base images of which the best gains as much, (P,)."""
        gains = self.frontier.best - self.frontier.best[:, :1]  # the best of one is the mean
        logs = np.log(np.arange(1, gains.shape[1] + 1))

        def best_of(rows: Numbers) -> Array:
            curve = gains[rows].mean(-2)
            return np.exp(_at(gain[rows].mean(-1), curve, np.broadcast_to(logs, curve.shape)))

        return self.estimate(best_of)


def _at(x: Array, xs: Array, ys: Array) -> Array:
    """Interpolate curves (..., L), xs increasing, each at its own x (...); constant beyond the ends."""
    right = (xs < x[..., None]).sum(-1, keepdims=True).clip(1, xs.shape[-1] - 1)
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(curve, right - 1 + i, -1)[..., 0] for i in (0, 1)] for curve in (xs, ys)
    )
    return y0 + ((x - x0) / (x1 - x0)).clip(0, 1) * (y1 - y0)
