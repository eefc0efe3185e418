"""A tuned model against what its run aimed at: the base's law times exp(scale * reward), told by base images.

The certificate (`am_diffusers.evaluation.certificate`) on the prompts of the evaluation, and beside each gain
the tilt's own. A model may gain more of the trained reward than the tilt, at a price that the tilt would not
pay: it is over-optimised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from am_diffusers.evaluation.certificate import Certificate, Tuned, certify
from am_diffusers.evaluation.frontier import Frontier, Tilted, best_of_kl, total_reward
from am_diffusers.evaluation.statistics import Array, Estimate, estimate
from am_diffusers.rewards import RewardScale

FEWEST_IMAGES = 3
ENOUGH_IMAGES = 16
"""Images a prompt below which a note asks for more."""
CAUTION = 2
"""How many times what halving the images takes off a prediction may be missing from it."""
STRIDE = 2
"""Every second of the frontier's scales is kept."""
COUNTS = (1, 1.5)
"""The curve of best-of-n has the powers of two, and one and a half times each."""
DIGITS = 4


@dataclass(frozen=True)
class Target:
    """Law that a run aimed at: the base's times exp(scale * weighted sum of rewards).

    Attributes:
        scale: reward_scale, > 0.
        rewards: scales of the trained rewards in their sum, by name.
    """

    scale: float
    rewards: Mapping[str, RewardScale]


@dataclass(frozen=True)
class Curve:
    """Curve in the plane of KL and gain, from the base on.

    Attributes:
        kl: KL divergence from the base in nats, rising from 0.
        gains: gains by reward name, in base sd, as many as `kl`; rewards without spread are missing.
    """

    kl: list[float]
    gains: dict[str, list[float]]


@dataclass(frozen=True)
class TiltComparison:
    """A tuned model beside the tilt that its run aimed at; numbers that base images can't tell are missing.

    Attributes:
        reward_scale: scale of the run.
        base_sd: standard deviation of the weighted sum over all base images.
        certificate: numbers of `Certificate` by name; gain and predicted are of the weighted sum in its unit.
        effective_share: effective share of base images at this scale, in (0, 1].
        largest_scale: largest scale at which these base images can tell; None = any.
        verdict: where the model stands, a sentence.
        predicted_kl: KL divergence of the tilt from the base, in nats.
        predicted: the tilt's gain in each reward, in its base sd.
        surplus: gain of the weighted sum beyond the tilt's, paired, in `base_sd`.
        over_optimised: whether the surplus is above 0 beyond doubt.
        frontier: gains of tilts of growing scale.
        best_of_n: gains of the best of n base images by the weighted sum, at the most KL that it can have.
    """

    reward_scale: float
    base_sd: float
    certificate: dict[str, Estimate]
    effective_share: float
    largest_scale: float | None
    verdict: str
    predicted_kl: Estimate | None
    predicted: dict[str, Estimate]
    surplus: Estimate | None
    over_optimised: bool
    frontier: Curve
    best_of_n: Curve


def compare_with_tilt(
    base: Mapping[str, Array],
    tuned: Mapping[str, Array],
    path_kl: Array,
    target: Target,
    *,
    resamples: int,
) -> TiltComparison | None:
    """Compare a tuned model with its target.

    Args:
        base: scores of the base's images by the same chain, by reward name, (P, S).
        tuned: scores of the tuned model's images from the same noise, (P, S).
        path_kl: KL divergence of the tuned chain from the base's in nats, (P, S).
        target: what the run aimed at.
        resamples: resamples of the bootstrap.

    Returns:
        None if a trained reward isn't among the scores, tells no base images of a prompt apart, or there are
        fewer than 3 images a prompt.
    """
    if not target.rewards.keys() <= base.keys():
        return None
    total = total_reward(base, target.rewards)
    if total.shape[1] < FEWEST_IMAGES or not total.std(axis=1).any():
        return None
    frontier, rewards = Frontier(total, base), total_reward(tuned, target.rewards)
    found = certify(frontier, target.scale, Tuned(rewards, path_kl), resamples=resamples)
    return _comparison(frontier, found, frontier.tilt(target.scale), rewards, resamples)


def _comparison(
    frontier: Frontier, found: Certificate, tilted: Tilted, rewards: Array, resamples: int
) -> TiltComparison:
    def mean(values: Array) -> Estimate:
        return estimate(np.mean, values, resamples=resamples)

    unit, known = float(frontier.rewards.std(ddof=1)), found.predicted is not None
    surplus = rewards.mean(axis=1) - tilted.reward
    lost = tilted.reward - frontier.told_by_half(tilted.scale)
    return TiltComparison(
        reward_scale=tilted.scale,
        base_sd=unit,
        certificate=found.estimates,
        effective_share=found.effective_share,
        largest_scale=found.largest_scale if np.isfinite(found.largest_scale) else None,
        verdict=found.verdict(),
        predicted_kl=mean(tilted.kl) if known else None,
        predicted=_predicted(frontier, tilted, mean) if known else {},
        surplus=mean(surplus / unit) if known else None,
        over_optimised=known and is_beyond(surplus, lost, mean),
        frontier=_frontier_curve(frontier),
        best_of_n=_best_of_curve(frontier),
    )


def _predicted(frontier: Frontier, tilted: Tilted, mean: Callable[[Array], Estimate]) -> dict[str, Estimate]:
    gains = {name: tilted.scores[name] - base.mean(axis=1) for name, base in frontier.scores.items()}
    return {name: mean(gains[name] / unit) for name, unit in _units(frontier).items()}


def is_beyond(surplus: Array, lost: Array, mean: Callable[[Array], Estimate]) -> bool:
    """Return whether a surplus over a prediction is beyond doubt.

    Args:
        surplus: measured less predicted, (P,).
        lost: prediction of all images less that of half of them, (P,).
        mean: estimates the mean with its interval.
    """
    lows = mean(surplus).low, mean(surplus - CAUTION * lost).low
    return all(low is not None and low > 0 for low in lows)


def _units(frontier: Frontier) -> dict[str, float]:
    """Return the standard deviation over all base images of each score that has one."""
    return {name: float(base.std(ddof=1)) for name, base in frontier.scores.items() if np.ptp(base) > 0}


def _frontier_curve(frontier: Frontier) -> Curve:
    tilts = frontier.curve[::-STRIDE][::-1]
    return Curve(
        [0.0, *_rounded([each.kl.mean() for each in tilts])],
        {
            name: [
                0.0,
                *_rounded([(t.scores[name].mean() - frontier.scores[name].mean()) / unit for t in tilts]),
            ]
            for name, unit in _units(frontier).items()
        },
    )


def _best_of_curve(frontier: Frontier) -> Curve:
    number = frontier.rewards.shape[1]
    powers = [int(factor * 2**power) for power in range(number.bit_length()) for factor in COUNTS]
    counts = sorted({count for count in (*powers, number) if count <= number})
    places = np.array(counts) - 1
    means = {name: frontier.of_best(scores).mean(axis=0)[places] for name, scores in frontier.scores.items()}
    return Curve(
        _rounded([best_of_kl(count) for count in counts]),
        {
            name: _rounded(((means[name] - frontier.scores[name].mean()) / unit).tolist())
            for name, unit in _units(frontier).items()
        },
    )


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
