"""Measures of how far a law is from the tilt, both as weighted points."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benching.oracles.mixture import Mixture
from benching.oracles.problems import Problem

DIRECTIONS = 32
"""Directions on which points of the plane are projected, evenly spaced."""


@dataclass(frozen=True)
class Points:
    """A law: points and their shares.

    Attributes:
        x: points (N, D), float64.
        weight: shares (N,), adding up to 1.

    Raises:
        ValueError: if a number is not finite or the shapes disagree.
    """

    x: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        if self.weight.shape != self.x.shape[:1] or not self.x.isfinite().all():
            raise ValueError(
                f"expected finite points (N, D) and a weight each, got {tuple(self.x.shape)} and "
                f"{tuple(self.weight.shape)}; did training diverge?"
            )

    @classmethod
    def equal(cls, x: Tensor) -> "Points":
        """Return points `x` (N, D) that all weigh the same."""
        return cls(x, x.new_full((len(x),), 1 / len(x)))

    def mean(self) -> Tensor:
        """Return the mean, (D,)."""
        return self.weight @ self.x

    def spread(self) -> float:
        """Return the root of the mean squared distance from the mean."""
        return math.sqrt((self.weight @ (self.x - self.mean()).square().sum(1)).item())


def wasserstein2(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor) -> float:
    """Return the exact Wasserstein-2 distance of two laws of weighted points on a line, (N,) and (M,) each.

    The root of the integral over u in (0, 1) of (quantile_a(u) - quantile_b(u))^2, whose integrand is
    constant between the two laws' cumulated weights.
    """
    (a, a_order), (b, b_order) = a.sort(), b.sort()
    a_levels, b_levels = a_weight[a_order].cumsum(0), b_weight[b_order].cumsum(0)
    levels = torch.cat([a_levels, b_levels]).sort().values.clamp(max=1)
    width = levels.diff(prepend=levels.new_zeros(1))
    middle = levels - width / 2
    apart = (
        a[torch.searchsorted(a_levels, middle).clamp(max=len(a) - 1)]
        - b[torch.searchsorted(b_levels, middle).clamp(max=len(b) - 1)]
    )
    return math.sqrt((width * apart.square()).sum().item())


def distance(a: Points, b: Points) -> float:
    """Return the Wasserstein-2 distance on a line; in the plane the root mean square over projections.

    Raises:
        ValueError: if the points have more than 2 dimensions.
    """
    dim = a.x.shape[1]
    if dim == 1:
        return wasserstein2(a.x[:, 0], a.weight, b.x[:, 0], b.weight)
    if dim > 2:
        raise ValueError(f"expected points on a line or in the plane, got {dim} dimensions")
    angles = math.pi * torch.arange(DIRECTIONS, dtype=torch.float64) / DIRECTIONS
    axes = torch.stack([angles.cos(), angles.sin()], 1)
    squares = [wasserstein2(a.x @ axis, a.weight, b.x @ axis, b.weight) ** 2 for axis in axes]
    return math.sqrt(sum(squares) / DIRECTIONS)


def measures(found: Points, aim: Mixture, points_of_aim: Points, problem: Problem) -> dict[str, float]:
    """Measure what sets a law apart from the mixture it should be.

    Args:
        found: the law to judge.
        aim: the mixture, of which moments and mode weights are exact.
        points_of_aim: the mixture as points, for the distance.
        problem: problem, which gives the reward.

    Returns:
        `w2`: see `distance`. `mean_bias`: distance of the means, on a line with its sign. `spread_bias`: the
        spread relative to the mixture's, minus 1. `mode_error`: share of the points that is in wrong modes
        (half the sum of the modes' absolute errors). `reward_gain`: mean reward minus the mixture's.
    """
    shift = found.mean() - aim.mean()
    spread = math.sqrt(aim.covariance().trace().item())
    modes = found.weight @ aim.posterior(found.x)
    reward = (found.weight @ problem.reward(found.x)).item()
    return {
        "w2": distance(found, points_of_aim),
        "mean_bias": shift.item() if len(shift) == 1 else shift.norm().item(),
        "spread_bias": found.spread() / spread - 1,
        "mode_error": 0.5 * (modes - aim.weights).abs().sum().item(),
        "reward_gain": reward - problem.mean_reward(aim),
    }
