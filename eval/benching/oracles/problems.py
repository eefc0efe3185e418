"""Problems for the methods: a mixture as the base's law, and a reward whose tilt is again a mixture.

    reward(x) = slope . x - curvature / 2 * |x|^2,        tilt = base * exp(reward)

Rewards are scaled so that reward_scale = 1. Their deviations under the base, .95, .8 and .65, are about as
large as RAM tolerates: on the first it diverges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benching.oracles.mixture import Mixture

REWARD_SCALE = 1.0


@dataclass(frozen=True)
class Problem:
    """A base law and a reward.

    Attributes:
        title: title on the page.
        law: law of the base's data, in 1 or 2 dimensions.
        slope: slope of the reward, (D,).
        curvature: curvature of the reward, >= 0.
    """

    title: str
    law: Mixture
    slope: Tensor
    curvature: float

    @property
    def dim(self) -> int:
        """Number D of dimensions."""
        return len(self.slope)

    def reward(self, x: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Return rewards of `x` (B, D), (B,)."""
        return x @ self.slope - 0.5 * self.curvature * x.square().sum(1)

    def tilt(self) -> Mixture:
        """Return the law aimed at, base * exp(REWARD_SCALE * reward)."""
        return self.law.tilted(REWARD_SCALE * self.slope, REWARD_SCALE * self.curvature)

    def mean_reward(self, law: Mixture) -> float:
        """Return the mean of the reward under a mixture, exactly."""
        mean, square = law.mean(), law.covariance().trace() + law.mean().square().sum()
        return (self.slope @ mean - 0.5 * self.curvature * square).item()

    def describe(self) -> dict[str, Any]:
        """Return everything that results depend on, for JSON."""
        return {
            "weights": self.law.weights.tolist(),
            "means": self.law.means.tolist(),
            "variances": self.law.variances.tolist(),
            "slope": self.slope.tolist(),
            "curvature": self.curvature,
            "reward_scale": REWARD_SCALE,
        }


def _mixture(weights: list[float], means: list[list[float]], std: float) -> Mixture:
    variances = [std**2] * len(weights)
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in (weights, means, variances)))


def _towards(best: list[float], curvature: float) -> tuple[Tensor, float]:
    """Return the slope and curvature of -curvature / 2 * |x - best|^2, up to a constant."""
    return curvature * torch.tensor(best, dtype=torch.float64), curvature


_TWO_MODES = _mixture([0.6, 0.4], [[-1.0], [1.0]], 0.4)
_FIVE_MODES = _mixture(
    [0.3, 0.25, 0.2, 0.15, 0.1], [[-1.2, -0.9], [-1.1, 1.0], [0.0, 0.0], [1.2, -1.0], [1.1, 1.1]], 0.3
)

PROBLEMS: dict[str, Problem] = {
    "two_modes_linear": Problem(
        "Two modes on a line, linear reward", _TWO_MODES, torch.tensor([0.9], dtype=torch.float64), 0.0
    ),
    "two_modes_quadratic": Problem(
        "Two modes on a line, quadratic reward", _TWO_MODES, *_towards([0.7], 0.9)
    ),
    "five_modes": Problem(
        "Five modes in the plane, quadratic reward", _FIVE_MODES, *_towards([1.0, 0.4], 0.5)
    ),
}
