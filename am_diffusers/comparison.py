"""What one reward says about base and tuned pictures of the same noise, for all prompts or for some of them.

Prompts are the unit that generalises: everything is a statistic of one number a prompt, its interval a
percentile bootstrap over prompts, widened for few of them. The plain percentile interval of a mean is that of
a normal law with the variance sum (x - mean)^2 / P, too narrow by

    t_{P-1} / z * sqrt(P / (P - 1))      (quantiles at 97.5 %; 9.2 for P = 2, 1.22 for 10, 1.03 for 64)

so that a comparison of a model with itself would be "significant" for 50, 10 and 6 % of such sets of prompts;
stretched about the estimate by that factor it is for 7, 5 and 5 %. It then is the t interval where there are
many prompts of normal numbers, and keeps the skewness of the bootstrap where they aren't normal. (Hesterberg
2015, arXiv:1411.5279, has the same factor in his expanded percentile interval. That moves the percentiles,
which can't reach beyond the outermost prompts.)
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from am_diffusers.evaluation import RESAMPLES, Array, bootstrap

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
