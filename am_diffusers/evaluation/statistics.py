"""Paired scores of base and tuned model, diversity, and one kind of interval for all of them.

Base and tuned images share prompt, noise, sampler and guidance, so each pair differs by the adapter only.
Prompts are the unit that generalises: intervals are 95 % percentile bootstraps over P prompts (Efron 1979),
stretched about the value by t(0.975, P - 1) / 1.96 * sqrt(P / (P - 1)). A percentile interval is too narrow
for few prompts: it calls a model different from itself in 50, 10 and 6 % of sets of 2, 10 and 64 prompts.
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
LEVEL = 0.05
RESAMPLES = 9999
NO_DISTANCE = 1e-9
"""Below this mean pairwise distance images are alike and their distance is rounding."""
_BATCH = 1000  # resamples held in memory at a time; doesn't change them


@dataclass(frozen=True)
class Estimate:
    """A statistic of prompts with its 95 % interval.

    Attributes:
        value: value for the prompts at hand.
        low: lower end; None where there's no interval: one prompt, or resamples without a value.
        high: upper end, or None.
    """

    value: float
    low: float | None
    high: float | None

    def scaled(self, factor: float) -> "Estimate":
        """Return value and ends times a factor > 0: the same in another unit."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Estimate(self.value * factor, low, high)

    def text(self, form: str, unit: str = "") -> str:
        """Return `value unit [low, high]` in a format such as `+.2f`; without an interval `value unit`."""
        value = f"{self.value:{form}}{unit and ' ' + unit}"
        if self.low is None or self.high is None:
            return value
        return f"{value} [{self.low:{form}}, {self.high:{form}}]"


def metrics_of(name: str, found: Estimate | None) -> dict[str, float]:
    """Return an estimate and its ends by name; nothing where it has no interval."""
    if found is None or found.low is None or found.high is None:
        return {}
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


@dataclass(frozen=True)
class Comparison:
    """Scores of tuned images against those of base images, paired by prompt and noise.

    Attributes:
        num_prompts: number P of prompts.
        images_per_prompt: number S of images a prompt, of base and tuned each.
        base_mean: mean score of the base images, in the reward's units.
        tuned_mean: mean score of the tuned images, in the reward's units.
        base_sd: unit of `gain`, in the reward's units; None if the base images have no spread.
        difference: mean paired difference tuned - base, in the reward's units.
        gain: mean paired difference in `base_sd`; None without it.
        win_rate: share of pairs whose tuned image scores higher, in [0, 1]; a tie counts half.
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
        """True if the interval of the difference excludes 0 and p < 0.05: both, as each can mislead alone.

        The interval is about the mean, which one prompt can move; the test is about ranks. One comparison
        only: some of many null comparisons are significant by chance.
        """
        low, high = self.difference.low, self.difference.high
        return self.p_value < LEVEL and low is not None and high is not None and (low > 0 or high < 0)


@dataclass(frozen=True)
class Diversity:
    """Difference between the images of one prompt.

    Attributes:
        features: name of the reward whose image features are compared.
        base: mean over prompts of the mean pairwise 1 - cos of the base images.
        tuned: mean over prompts of the mean pairwise 1 - cos of the tuned images.
        kept: tuned / base, >= 0; None if the base images of each prompt are alike.
    """

    features: str
    base: float
    tuned: float
    kept: Estimate | None


def estimate(
    statistic: Callable[..., Array],
    *samples: NDArray[Any],
    span: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
) -> Estimate:
    """Return a statistic of paired samples (P,) of P >= 1 prompts, with the interval of the module docstring.

    Args:
        statistic: vectorised: takes the samples and `axis`, reduces that axis.
        samples: one number a prompt, resampled together.
        span: values that the statistic can take; the interval ends there.
        resamples: number of resamples of the bootstrap.
    """
    value, number = float(statistic(*samples, axis=-1)), len(samples[0])
    if number < 2:
        return Estimate(value, None, None)
    percentiles = _percentiles(statistic, samples, resamples)
    if not np.isfinite(percentiles).all():
        return Estimate(value, None, None)
    low, high = (value + _stretch(number) * (end - value) for end in percentiles)
    return Estimate(value, max(low, span[0]), min(high, span[1]))


def _percentiles(
    statistic: Callable[..., Array], samples: tuple[NDArray[Any], ...], resamples: int
) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % points of the resampled statistic."""
    # A resample of a ratio may divide by 0: then there's no interval.
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=min(_BATCH, resamples),
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(found.low), float(found.high)


def _stretch(number: int) -> float:
    """Return how much wider the percentile interval of `number` prompts has to be."""
    upper = 1 - LEVEL / 2
    ratio = stats.t.ppf(upper, number - 1) / stats.norm.ppf(upper)
    return float(ratio) * math.sqrt(number / (number - 1))


def compare(
    base: Array, tuned: Array, *, unit: float | None = None, resamples: int = RESAMPLES
) -> Comparison:
    """Compare the scores of one reward in pairs.

    Args:
        base: scores of the base images, (P prompts, S images a prompt).
        tuned: scores of the tuned images made from the same noise, (P, S).
        unit: unit of `gain`: the `base_sd` of the whole, for a comparison of some of its prompts, whose gains
            then average to that of the whole. None = the standard deviation of `base`.
        resamples: number of resamples of the bootstrap.

    Raises:
        ValueError: if the shapes differ, there are no scores, or one isn't finite.
    """
    if base.ndim != 2 or base.shape != tuned.shape or not base.size:
        raise ValueError(
            f"expected scores (prompts, images) of base and tuned alike, got {base.shape} and {tuned.shape}"
        )
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        raise ValueError("expected finite scores, got NaN or infinity: score those images again")
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
    """Return the standard deviation over all images; None if they all score the same."""
    return float(scores.std(ddof=1)) if np.ptp(scores) > 0 else None


def _wilcoxon(differences: Array) -> float:
    if not differences.any():
        return 1.0
    result: Any = stats.wilcoxon(differences)  # scipy's result objects have no types
    return float(result.pvalue)


def pairwise_distance(features: Array) -> Array:
    """Return the mean pairwise 1 - cos among the images of each prompt.

    Args:
        features: image features, (P prompts, S >= 2 images, D), any norm.

    Returns:
        (P,), each in [0, 2].
    """
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    count = unit.shape[1]
    cosines = np.einsum("psd,ptd->pst", unit, unit)
    return 1 - (cosines.sum(axis=(1, 2)) - np.trace(cosines, axis1=1, axis2=2)) / (count * (count - 1))


def diversity(name: str, base: Array, tuned: Array) -> Diversity:
    """Return the diversity kept, from image features (P, S >= 2, D) of base and tuned images."""
    distances = pairwise_distance(base), pairwise_distance(tuned)
    return Diversity(name, float(distances[0].mean()), float(distances[1].mean()), diversity_kept(*distances))


def diversity_kept(base: Array, tuned: Array, *, resamples: int = RESAMPLES) -> Estimate | None:
    """Return mean of `tuned` / mean of `base`, from the pairwise distances (P,) of each prompt's images.

    None if the base images of each prompt are alike.
    """
    if not base.mean() > NO_DISTANCE:
        return None
    return estimate(_ratio_of_means, base, tuned, span=(0, math.inf), resamples=resamples)


def _ratio_of_means(base: Array, tuned: Array, axis: int) -> Array:
    return tuned.mean(axis=axis) / base.mean(axis=axis)
