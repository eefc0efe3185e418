"""Does the tuned model differ from the base, and by how much: paired scores, intervals, diversity.

Base and tuned pictures share prompt, noise, sampler and guidance, so each pair differs by the adapter only.
Prompts are the unit that generalises: intervals are 95 % percentile bootstraps over prompts (Efron 1979).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
RESAMPLES = 9999
_BATCH = 1000  # resamples held in memory at a time; doesn't change them


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RewardGain:
    """What one reward says about the tuned model.

    Attributes:
        role: trained or held-out.
        base_mean: mean score of the base pictures, in the reward's units.
        tuned_mean: mean score of the tuned pictures, in the reward's units.
        base_sd: standard deviation over all base pictures, in the reward's units.
        gain: mean paired difference in base standard deviations.
    """

    role: str
    base_mean: float
    tuned_mean: float
    base_sd: float
    gain: Interval


@dataclass(frozen=True)
class Diversity:
    """How different the pictures of one prompt are.

    Attributes:
        features: name of the reward whose image features are compared.
        base: mean over prompts of the mean pairwise 1 - cos of the base pictures.
        tuned: the same of the tuned pictures.
        kept: tuned / base.
    """

    features: str
    base: float
    tuned: float
    kept: Interval


def bootstrap(
    statistic: Callable[..., Array], *samples: Array, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Statistic of paired samples with its 95 % percentile bootstrap interval over their first dimension.

    Args:
        statistic: vectorised: takes the samples and `axis`, reduces that axis.
        samples: arrays of shape (P,), resampled together, P >= 2.
        seed: of the resampling.
        resamples: how many.
    """
    result = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=min(_BATCH, resamples),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(statistic(*samples, axis=-1)), float(result.low), float(result.high))


def reward_gain(base: Array, tuned: Array, role: str) -> RewardGain:
    """Paired gain of one reward.

    Args:
        base: scores of the base pictures, (P prompts, S pictures a prompt).
        tuned: scores of the tuned pictures made from the same noise, (P, S).
        role: trained or held-out.

    Raises:
        ValueError: if all base pictures score the same, so that there's no unit to measure a gain in.
    """
    base_sd = float(base.std(ddof=1))
    if not base_sd > 0:
        raise ValueError(f"the {role} reward scores all {base.size} base pictures {base.flat[0]}: no spread")
    gain = bootstrap(np.mean, (tuned - base).mean(axis=1) / base_sd)
    return RewardGain(role, float(base.mean()), float(tuned.mean()), base_sd, gain)


def pairwise_distance(features: Array) -> Array:
    """Mean pairwise 1 - cos among the pictures of each prompt.

    Args:
        features: image features, (P prompts, S >= 2 pictures, D), any norm.

    Returns:
        (P,), each in [0, 2].
    """
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    count = unit.shape[1]
    cosines = np.einsum("psd,ptd->pst", unit, unit)
    return 1 - (cosines.sum(axis=(1, 2)) - np.trace(cosines, axis1=1, axis2=2)) / (count * (count - 1))


def diversity(name: str, base: Array, tuned: Array) -> Diversity:
    """Diversity kept, from image features (P, S, D) of base and tuned pictures."""
    distances = pairwise_distance(base), pairwise_distance(tuned)
    kept = bootstrap(ratio_of_means, *distances)
    return Diversity(name, float(distances[0].mean()), float(distances[1].mean()), kept)


def ratio_of_means(base: Array, tuned: Array, axis: int) -> Array:
    """Mean of `tuned` over mean of `base`: the diversity kept, from the distances of each prompt."""
    return tuned.mean(axis=axis) / base.mean(axis=axis)


LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A statistic of prompts with its 95 % interval.

    Attributes:
        value: of the prompts at hand.
        low: lower end; None where there's no interval: one prompt, or resamples without a value.
        high: upper end, or None.
    """

    value: float
    low: float | None
    high: float | None

    def scaled(self, factor: float) -> "Estimate":
        """Value and ends times a factor > 0: the same in another unit."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Estimate(self.value * factor, low, high)


@dataclass(frozen=True)
class Comparison:
    """Scores of tuned pictures against those of base pictures, paired by prompt and noise.

    Attributes:
        num_prompts: P.
        images_per_prompt: S, of base and tuned each.
        base_mean: mean score of the base pictures, in the reward's units.
        tuned_mean: mean score of the tuned pictures, in the reward's units.
        base_sd: the unit of `gain`, in the reward's units; None if the base pictures have no spread.
        difference: mean paired difference tuned - base, in the reward's units.
        gain: the same in `base_sd`; None without it.
        win_rate: share of pairs whose tuned picture scores higher, in [0, 1]; a tie counts half.
        p_value: two-sided Wilcoxon signed-rank test of the prompts' mean differences; 1 if all are 0.
    """

    num_prompts: int
    images_per_prompt: int
    base_mean: float
    tuned_mean: float
    base_sd: float | None
    difference: Estimate
    gain: Estimate | None
    win_rate: Estimate
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference excludes 0 and p < 0.05: both, as each can mislead alone.

        The interval is about the mean, which one prompt can move; the test is about ranks. One comparison
        only: of many null comparisons some are significant by chance.
        """
        low, high = self.difference.low, self.difference.high
        return self.p_value < LEVEL and low is not None and high is not None and (low > 0 or high < 0)


def estimate(
    statistic: Callable[..., Array],
    *samples: Array,
    span: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
) -> Estimate:
    """Statistic of paired samples (P,) of P >= 1 prompts, with the interval that the module describes.

    Args:
        statistic: vectorised: takes the samples and `axis`, reduces that axis.
        samples: one number a prompt, resampled together.
        span: values that the statistic can take; the interval ends there.
        resamples: of the bootstrap.
    """
    value, number = float(statistic(*samples, axis=-1)), len(samples[0])
    if number < 2:
        return Estimate(value, None, None)
    # A resample of a ratio may divide by 0: then there's no interval.
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        plain = bootstrap(statistic, *samples, resamples=resamples)
    if not (math.isfinite(plain.low) and math.isfinite(plain.high)):
        return Estimate(value, None, None)
    stretch = _stretch(number)
    low, high = (value + stretch * (end - value) for end in (plain.low, plain.high))
    return Estimate(value, max(low, span[0]), min(high, span[1]))


def _stretch(number: int) -> float:
    """How much wider the percentile interval of so many prompts has to be."""
    upper = 1 - LEVEL / 2
    ratio = stats.t.ppf(upper, number - 1) / stats.norm.ppf(upper)
    return float(ratio) * math.sqrt(number / (number - 1))


def compare(
    base: Array, tuned: Array, *, unit: float | None = None, resamples: int = RESAMPLES
) -> Comparison:
    """Paired comparison of one reward.

    Args:
        base: scores of the base pictures, (P prompts, S pictures a prompt).
        tuned: scores of the tuned pictures made from the same noise, (P, S).
        unit: what `gain` is measured in: the `base_sd` of the whole, for a comparison of some of its prompts,
            whose gains then average to that of the whole. None = the standard deviation of `base`.
        resamples: of the bootstrap.

    Raises:
        ValueError: if the shapes differ, there are no scores, or one isn't finite.
    """
    if base.ndim != 2 or base.shape != tuned.shape or not base.size:
        raise ValueError(
            f"expected scores (prompts, pictures) of base and tuned alike, got {base.shape} and {tuned.shape}"
        )
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        raise ValueError("expected finite scores, got NaN or infinity: score those pictures again")
    unit = _spread(base) if unit is None else unit
    differences = (tuned - base).mean(axis=1)
    wins = (np.sign(tuned - base).mean(axis=1) + 1) / 2
    difference = estimate(np.mean, differences, resamples=resamples)
    return Comparison(
        num_prompts=base.shape[0],
        images_per_prompt=base.shape[1],
        base_mean=float(base.mean()),
        tuned_mean=float(tuned.mean()),
        base_sd=unit,
        difference=difference,
        gain=None if unit is None else difference.scaled(1 / unit),
        win_rate=estimate(np.mean, wins, span=(0, 1), resamples=resamples),
        p_value=_wilcoxon(differences),
    )


def _spread(scores: Array) -> float | None:
    """Standard deviation over all pictures; None if they all score the same."""
    return float(scores.std(ddof=1)) if np.ptp(scores) > 0 else None


def _wilcoxon(differences: Array) -> float:
    if not differences.any():
        return 1.0
    result: Any = stats.wilcoxon(differences)  # scipy's result objects have no types
    return float(result.pvalue)
