"""The law that fine-tuning aims at when its distance from the base is an f-divergence.

    maximise  E[r] - alpha D_f(tuned | base),   alpha = 1 / reward_scale
    tuned = ratio(z) * base,   ratio = (f')^{-1},   z = reward_scale * (r - normaliser)

with the normaliser that makes the mean of ratio(z) over base samples 1 (Tang, arXiv 2403.06279). All f here
are shifted so that ratio(0) = 1. Adjoint Matching samples `tuned` if the gradient of its terminal reward is
that of log ratio(z), so only the factor of the reward's gradient changes, from reward_scale to

    reward_scale * slope(z),   slope = d log ratio / dz.

    name          ratio(z)              slope(z)           defined for
    kl            exp(z)                1                  all z
    power, q      (1 + q z)^(1/q)       1 / (1 + q z)      1 + q z > 0
    pearson_chi2  1 + z                 1 / (1 + z)        power with q = 1: saturates
    forward_kl    1 / (1 - z)           1 / (1 - z)        power with q = -1: seeks the best reward
    js            exp(z) / (2 - exp(z)) 2 / (2 - exp(z))   z < log 2

The power family is the q-family for q > 0 and the gamma-family for q = -gamma in (-1, 0). The slope is
positive on every domain: more reward is never worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

DivergenceName = Literal["kl", "power", "pearson_chi2", "forward_kl", "js"]
EXPONENTS = {"kl": 0.0, "pearson_chi2": 1.0, "forward_kl": -1.0}
BISECTIONS = 200


@dataclass(frozen=True)
class Divergence:
    """An f-divergence, as the density ratio it makes optimal.

    Attributes:
        name: which.
        q: exponent of `power`, in [-1, inf); not used by the others.

    Raises:
        ValueError: if the name is unknown or q < -1, where the ratio's mean may not exist.
    """

    name: DivergenceName
    q: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in (*EXPONENTS, "power", "js"):
            raise ValueError(
                f"divergence must be kl, power, pearson_chi2, forward_kl or js, got {self.name!r}"
            )
        if not self.q >= -1:
            raise ValueError(f"divergence power needs q >= -1, got {self.q}")

    def log_ratio(self, z: Tensor) -> Tensor:
        """Log of tuned / base density; -inf below the domain, inf above it."""
        q = EXPONENTS.get(self.name, self.q)
        if self.name == "js":
            return torch.where(z < math.log(2), z - torch.log(2 - z.clamp(max=math.log(2)).exp()), math.inf)
        return z if q == 0 else (q * z).clamp(min=-1).log1p() / q

    def slope(self, z: Tensor, max_slope: float) -> Tensor:
        """Derivative of log ratio in z, > 0 and at most `max_slope`, which it also is outside the domain."""
        q = EXPONENTS.get(self.name, self.q)
        inverse = 1 - z.exp() / 2 if self.name == "js" else 1 + q * z
        return 1 / inverse.clamp(min=1 / max_slope)

    def normaliser(self, rewards: Tensor, reward_scale: float) -> float:
        """Return the reward at which the ratio is 1, so that its mean over base samples is 1, by bisection.

        Args:
            rewards: rewards of base samples, (N,), N >= 1.
            reward_scale: 1 / alpha.

        Returns:
            A number between the least and the largest of the rewards.
        """
        rewards = rewards.double()
        low, high = (value.item() for value in rewards.aminmax())
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.log_ratio(reward_scale * (rewards - middle)).exp().mean() > 1:
                low = middle
            else:
                high = middle
        return (low + high) / 2


@dataclass(frozen=True)
class Tilt:
    """Factor of the reward's gradient relative to reward_scale, for rewards of known prompts.

    Attributes:
        divergence: which.
        reward_scale: 1 / alpha.
        pooled: normaliser over all prompts, for those without one of their own.
        by_prompt: normalisers of single prompts.
        max_slope: clamp; rewards that no base sample came near lie outside the domain of q < 0.

    Raises:
        ValueError: if max_slope isn't at least 1.
    """

    divergence: Divergence
    reward_scale: float
    pooled: float = 0.0
    by_prompt: Mapping[str, float] = field(default_factory=dict)
    max_slope: float = 10.0

    def __post_init__(self) -> None:
        if not self.max_slope >= 1:
            raise ValueError(f"max_slope must be at least 1, the slope of kl, got {self.max_slope}")

    @classmethod
    def estimate(
        cls,
        divergence: Divergence,
        reward_scale: float,
        rewards: Mapping[str, Tensor],
        *,
        per_prompt: bool,
        max_slope: float = 10.0,
    ) -> "Tilt":
        """From rewards (N,) of base samples of each prompt.

        Args:
            divergence: which.
            reward_scale: 1 / alpha.
            rewards: rewards of base samples, by prompt.
            per_prompt: a normaliser for each prompt; else, for prompts that are a sample of many, the pooled
                one alone.
            max_slope: see the class.
        """
        pooled = divergence.normaliser(torch.cat(list(rewards.values())), reward_scale)
        own = rewards.items() if per_prompt else ()
        by_prompt = {prompt: divergence.normaliser(each, reward_scale) for prompt, each in own}
        return cls(divergence, reward_scale, pooled, by_prompt, max_slope)

    def slopes(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """Slope of log ratio at each reward, (B,) in (0, max_slope]."""
        normalisers = rewards.new_tensor([self.by_prompt.get(prompt, self.pooled) for prompt in prompts])
        return self.divergence.slope(self.reward_scale * (rewards - normalisers), self.max_slope)
