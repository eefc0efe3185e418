"""The frontier of reward and KL: what a tilt of the base would give, from the rewards of base images alone.

Of all laws with the same KL divergence from the base, base * exp(scale * reward) has the highest mean reward.
Images x_1 .. x_N of one prompt with rewards r_i tell it in advance (self-normalised importance sampling):
with weights w_i = exp(scale r_i) / sum_j exp(scale r_j)

    mean of f under the tilt    sum_i w_i f_i
    log normaliser              log mean_i exp(scale r_i)
    KL of the tilt              scale * (mean of r under the tilt) - log normaliser
    effective share             1 / (N sum_i w_i^2)

All but the share are freed of their bias of order 1 / N by the jackknife (Quenouille 1956). Every prompt has
a normaliser of its own; means over prompts are taken last. Below an effective share of `MIN_SHARE`, or an
effective number of `MIN_IMAGES`, a few images decide, and nothing is claimed.

Best-of-n, what anybody gets without training, shows the best of n base images of a prompt: a KL of at most
log n - (n - 1) / n (Beirami et al., arXiv 2401.01879).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import gammaln, logsumexp, softmax
from torch import Tensor

from am_diffusers.evaluation.statistics import Array
from am_diffusers.rewards import RewardScale

MIN_SHARE, MIN_IMAGES = 0.1, 6
CURVE = 41


@dataclass(frozen=True, eq=False)
class Tilted:
    """The base tilted by exp(scale * reward), by prompt.

    Attributes:
        scale: factor of the reward.
        reward: mean reward, (P,).
        scores: means of other scores, by name, (P,) each.
        log_normaliser: log E_base[exp(scale * reward)], (P,).
        kl: KL divergence from the base in nats, (P,).
        effective_share: effective number of base images over their number, in (0, 1], (P,).
    """

    scale: float
    reward: Array
    scores: Mapping[str, Array]
    log_normaliser: Array
    kl: Array
    effective_share: Array


@dataclass(frozen=True, eq=False)
class Frontier:
    """Rewards of base images, and what tilts of the base are worth.

    Attributes:
        rewards: reward that is tilted by, (P prompts, N >= 3 images).
        scores: other scores of the same images, by name, (P, N) each.

    Raises:
        ValueError: if shapes differ, a number isn't finite, or the images of each prompt all score the same.
    """

    rewards: Array
    scores: Mapping[str, Array]

    def __post_init__(self) -> None:
        tables = [self.rewards, *self.scores.values()]
        if self.rewards.ndim != 2 or any(table.shape != self.rewards.shape for table in tables):
            raise ValueError(f"expected scores (prompts, images), got {[table.shape for table in tables]}")
        if self.rewards.shape[1] < 3 or not all(np.isfinite(table).all() for table in tables):
            raise ValueError("a frontier needs at least 3 base images a prompt, and finite scores")
        if not self.rewards.std(axis=1).any():
            raise ValueError("all base images of a prompt have the same reward: no tilt can change anything")

    @classmethod
    def of(cls, scores: Mapping[str, Tensor], trained: Mapping[str, RewardScale]) -> "Frontier":
        """Return the frontier of the weighted sum of the trained rewards.

        Args:
            scores: raw scores of base images by reward name, (P, N) each.
            trained: scales of the rewards in the sum.
        """
        tables = {name: each.double().cpu().numpy() for name, each in scores.items()}
        return cls(total_reward(tables, trained), tables)

    def tilt(self, scale: float) -> Tilted:
        """Return the base tilted by exp(scale * reward)."""
        exponents = scale * self.rewards
        shares = softmax(exponents, axis=-1)

        reward, normaliser = tilted_mean(exponents, self.rewards), jackknife(log_mean_exp, exponents)
        return Tilted(
            scale=scale,
            reward=reward,
            scores={name: tilted_mean(exponents, values) for name, values in self.scores.items()},
            log_normaliser=normaliser,
            kl=scale * reward - normaliser,
            effective_share=1 / (shares.shape[1] * np.square(shares).sum(-1)),
        )

    def told_by_half(self, scale: float) -> Array:
        """Return the tilt's mean reward as half the images tell it, the mean of both halves, (P,)."""
        half = self.rewards.shape[1] // 2
        halves = self.rewards[:, :half], self.rewards[:, -half:]
        return np.mean([tilted_mean(scale * each, each) for each in halves], axis=0)

    @property
    def least_share(self) -> float:
        """The least effective share at which these images can tell: `MIN_SHARE`, more of few images."""
        return min(0.9, max(MIN_SHARE, MIN_IMAGES / self.rewards.shape[1]))

    @cached_property
    def largest_scale(self) -> float:
        """The largest scale whose effective share, a mean over prompts, is `least_share`."""
        number = self.rewards.shape[1]

        def excess(log_scale: float) -> float:
            shares = softmax(math.exp(log_scale) * self.rewards, axis=-1)
            return float((1 / (number * np.square(shares).sum(-1))).mean()) - self.least_share

        middle = -math.log(self._deviation)
        above = middle + 1
        while excess(above) > 0:
            above += 1
            if above > middle + 20:  # ties at the top, for instance of a reward with few values
                return math.inf
        return math.exp(_root(excess, middle - 5, above))

    def scale_at(self, kl: float) -> float:
        """Return the scale whose tilt has this KL divergence, a mean over prompts.

        Raises:
            ValueError: if these base images can't tell.
        """
        end = self.curve[-1]
        if not 0 < kl <= end.kl.mean():
            raise ValueError(
                f"these base images, {self.rewards.shape[1]} a prompt, tell the tilt up to a KL of "
                f"{end.kl.mean():.3g} nats: {kl:g} is beyond"
            )

        def excess(log_scale: float) -> float:
            return float(self.tilt(math.exp(log_scale)).kl.mean()) - kl

        last = math.log(end.scale)
        # For small scales the KL is scale^2 * variance / 2.
        first = min(last, 0.5 * math.log(2 * kl / self.variance.mean())) - 5
        return math.exp(_root(excess, first, last))

    @cached_property
    def curve(self) -> list[Tilted]:
        """Tilts at `CURVE` scales, from next to nothing to the largest that these images can tell."""
        end = min(self.largest_scale, 1e3 / self._deviation)
        return [self.tilt(scale) for scale in np.geomspace(end / 300, end, CURVE).tolist()]

    @cached_property
    def best(self) -> Array:
        """Mean reward of the best of n = 1 .. N base images, over all choices of n, (P, N)."""
        return self.of_best(self.rewards)

    def of_best(self, values: Array) -> Array:
        """Return the mean of values (P, N) of the best of n = 1 .. N images, over all choices, (P, N)."""
        number = self.rewards.shape[1]
        ranks = np.arange(1, number + 1)
        # The best of n is the image of rank i in binom(i - 1, n - 1) of all choices.
        chances = np.exp(
            log_choices(ranks[None] - 1, ranks[:, None] - 1) - log_choices(number, ranks[:, None])
        )
        return np.take_along_axis(values, np.argsort(self.rewards, axis=1), axis=1) @ chances.T

    @property
    def _deviation(self) -> float:
        """Standard deviation within prompts."""
        return float(np.sqrt(self.variance.mean()))

    @property
    def variance(self) -> Array:
        """Variance of the reward of each prompt, (P,)."""
        return self.rewards.var(axis=1, ddof=1)


def log_choices(number: Any, chosen: Any) -> Array:
    """Return the logarithm of the number of ways to choose `chosen` of `number`, -inf where there's none."""
    rest = np.asarray(number - chosen, dtype=np.float64)
    ways = gammaln(number + 1.0) - gammaln(chosen + 1.0) - gammaln(np.maximum(rest, 0) + 1.0)
    return np.where(rest < 0, -np.inf, ways)


def total_reward(scores: Mapping[str, Array], trained: Mapping[str, RewardScale]) -> Array:
    """Return the weighted sum of the trained rewards from raw scores by name."""
    terms = [each.weight * (scores[name] - each.mean) / each.std for name, each in trained.items()]
    return np.sum(terms, axis=0)


def log_mean_exp(exponents: Array) -> Array:
    """Return log mean exp over the last axis."""
    return logsumexp(exponents, axis=-1) - math.log(exponents.shape[-1])


def tilted_mean(exponents: Array, values: Array) -> Array:
    """Return the mean of values (P, N) under weights proportional to exp(exponents), without bias, (P,)."""
    return jackknife(lambda e, v: (softmax(e, axis=-1) * v).sum(-1), exponents, values)


def jackknife(statistic: Callable[..., Array], *samples: Array) -> Array:
    """Return N * statistic(all) - (N - 1) * (mean of the statistic with one left out), (P,).

    Args:
        statistic: takes the samples and reduces their last axis.
        samples: (P, N) each.
    """
    number = samples[0].shape[-1]
    others = np.arange(number)[None].repeat(number, 0)[~np.eye(number, dtype=bool)].reshape(number, -1)
    without_one = statistic(*(each[:, others] for each in samples)).mean(-1)
    return number * statistic(*samples) - (number - 1) * without_one


def best_of_kl(number: float) -> float:
    """Return log n - (n - 1) / n, the most that the best of n images can differ from one, in nats."""
    return math.log(number) - (number - 1) / number


def best_of_at(kl: float) -> float:
    """Return the n >= 1, not only whole, whose `best_of_kl` is `kl`."""
    return 1.0 if kl <= 0 else math.exp(_root(lambda log: best_of_kl(math.exp(log)) - kl, 0, kl + 2))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function changes its sign."""
    return float(root_scalar(function, bracket=(low, high)).root)
