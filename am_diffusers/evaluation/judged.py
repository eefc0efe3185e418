"""The answers of the judge of the embedded world to an evaluation: right among clean images, and diversity.

Spoilt images differ from each other by their defects, and some are beyond telling: object and background, and
the diversity of a prompt's images, are compared among those images that are clean, of base and tuned model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from am_diffusers.evaluation.statistics import Array, Estimate, estimate
from am_diffusers.rewards.world import WorldClean, WorldRight


@dataclass(frozen=True)
class Judged:
    """Clean images of base and tuned model.

    Attributes:
        right_base: share of the base's clean images that show what the prompt says, in [0, 1].
        right_tuned: share of the tuned model's.
        right: tuned less base, with the interval over prompts.
        diversity: mean pairwise distance of clean and right images of a prompt, tuned over base; None without
            image features, or where there are no two such images of a prompt.
    """

    right_base: float
    right_tuned: float
    right: Estimate
    diversity: Estimate | None

    def headline(self) -> list[str]:
        """Return the lines that a run ends with."""
        change = self.right.scaled(100).text("+.1f", "points")
        lines = [f"right among clean images: {change} ({self.right_base:.1%} -> {self.right_tuned:.1%})"]
        if self.diversity is not None:
            lines.append(f"diversity kept among clean and right images: {self.diversity.text('.0%')}")
        return lines


def judge(scores: Mapping[str, Array], features: Array | None) -> Judged | None:
    """Return what the judge says; None if `world_clean` and `world_right` aren't both among the scores.

    Args:
        scores: by reward name, (P prompts, S images, 2: base and tuned).
        features: image features, (P, S, 2, D).
    """
    if not {WorldClean.name, WorldRight.name} <= scores.keys():
        return None
    clean = scores[WorldClean.name]
    good = clean * scores[WorldRight.name]
    columns = good.sum(1)[:, 0], clean.sum(1)[:, 0], good.sum(1)[:, 1], clean.sum(1)[:, 1]
    if not (clean.sum((0, 1)) > 0).all():
        return None
    base, tuned = (good.sum((0, 1)) / clean.sum((0, 1))).tolist()
    return Judged(base, tuned, estimate(_change, *columns), _diversity(features, good))


def _diversity(features: Array | None, good: Array) -> Estimate | None:
    """Return the mean distance of two good images of a prompt, tuned over base."""
    if features is None:
        return None
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    distances = 1 - np.einsum("psmd,ptmd->pmst", unit, unit)
    pairs = np.einsum("psm,ptm->pmst", good, good) * (1 - np.eye(good.shape[1]))
    sums, numbers = (distances * pairs).sum((2, 3)), pairs.sum((2, 3))
    if not (numbers.sum(0) > 0).all():
        return None
    return estimate(_ratio, sums[:, 0], numbers[:, 0], sums[:, 1], numbers[:, 1], span=(0, math.inf))


def _change(good: Array, clean: Array, good_tuned: Array, clean_tuned: Array, axis: int) -> Array:
    return good_tuned.sum(axis) / clean_tuned.sum(axis) - good.sum(axis) / clean.sum(axis)


def _ratio(base: Array, pairs: Array, tuned: Array, pairs_tuned: Array, axis: int) -> Array:
    return (tuned.sum(axis) / pairs_tuned.sum(axis)) / (base.sum(axis) / pairs.sum(axis))
