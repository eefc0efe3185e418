"""Two settings where both have the same trained gain, with intervals of the whole comparison."""

from dataclasses import dataclass

import numpy as np

from am_diffusers.evaluation.statistics import Estimate
from benching.images.curves import Curve, Place, Rows, where

SHARE = 0.9
RESAMPLES = 2000


@dataclass(frozen=True)
class EqualReward:
    """Results of two settings where their trained gain is `level`.

    Attributes:
        level: SHARE of the highest trained gain that both reach: the highest itself is one of a few noisy
            numbers. In base standard deviations.
        reference: point of the reference.
        other: point of the other setting.
        difference: held-out gain of the other minus the reference's.
        seconds: training seconds of the other, as a multiple of the reference's.
        calls: transformer calls of the other, as a multiple of the reference's.
    """

    level: float
    reference: Place
    other: Place
    difference: Estimate
    seconds: Estimate
    calls: Estimate


def at_equal_reward(reference: Curve, other: Curve, *, seed: int = 0) -> EqualReward | None:
    """Compare two settings where both have the same trained gain; None if one never gains.

    Intervals are 95 % percentile bootstraps of everything: level and places are found anew for each resample
    of prompts, the same ones for both settings, and of each setting's runs. Resamples in which one never
    gains are left out. With a few runs, their part is too narrow; with a single run, what another seed would
    change is not in them at all; nor is what a straight line between two marks leaves out.

    Args:
        reference: usually Adjoint Matching.
        other: setting compared with it.
        seed: seed of the resampling.
    """
    found = _compare(reference, other, None, (None, None))
    if found is None:
        return None
    rng, prompts = np.random.default_rng(seed), reference.by_prompt("trained").shape[-1]
    resampled = []
    for _ in range(RESAMPLES):
        rows = rng.integers(prompts, size=prompts)
        runs = tuple(rng.integers(curve.seeds, size=curve.seeds) for curve in (reference, other))
        resampled.append(_compare(reference, other, rows, (runs[0], runs[1])))
    numbers = np.array([_numbers(each) for each in resampled if each is not None])
    low, high = np.quantile(numbers, (0.025, 0.975), axis=0)
    difference, seconds, calls = (
        Estimate(value, float(a), float(b)) for value, a, b in zip(_numbers(found), low, high, strict=True)
    )
    return EqualReward(*found, difference, seconds, calls)


Found = tuple[float, Place, Place]


def _compare(
    reference: Curve, other: Curve, prompts: Rows | None, runs: tuple[Rows | None, Rows | None]
) -> Found | None:
    places = [curve.places(own, prompts) for curve, own in zip((reference, other), runs, strict=True)]
    level = SHARE * min(float(each[0].max()) for each in places)
    ours, theirs = (where(each, level) for each in places) if level > 0 else (None, None)
    return None if ours is None or theirs is None else (level, ours, theirs)


def _numbers(found: Found) -> tuple[float, float, float]:
    _, ours, theirs = found
    return theirs.held_out - ours.held_out, theirs.seconds / ours.seconds, theirs.calls / ours.calls
