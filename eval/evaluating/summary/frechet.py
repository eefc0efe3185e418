"""Frechet distance between two sets of images, by their features (Heusel et al. 2017, arXiv:1706.08500).

    d^2 = |mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

It is that of two normal laws with the moments of the sets; with Inception features it is known as FID. Here
it is taken of whatever features images have: numbers of different features, and FIDs, can't be compared.

It is biased upwards, the more the fewer images: two small sets of one law seem to differ. So
it says something only beside a distance of sets of the same size, and that is what `FrechetFromBase` has.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from am_diffusers.evaluation.statistics import Array

SPLITS = 4


@dataclass(frozen=True)
class FrechetFromBase:
    """Distance of the tuned images as a set from the base images.

    Attributes:
        distance: squared distance of all tuned from all base images. Both are made from the same noise, so
            it can be below `floor`, and its size says little.
        halves: squared distance of half the tuned from the other half of the base images: other noise, and
            for two or more images per prompt the same prompts. Mean of several splits.
        floor: the same with the base in the tuned model's place: what chance and bias make of no difference.
            `halves - floor` is 0 on average for an unchanged model, and how far it moved otherwise.
        pictures_per_half: images in each of the sets that `halves` and `floor` compare.
    """

    distance: float
    halves: float
    floor: float
    pictures_per_half: int


def frechet_distance(first: Array, second: Array) -> float:
    """Return the squared Frechet distance of features (N, D) and (M, D), in squared units of the features.

    With C = F^T F the trace of (C_1 C_2)^(1/2) is the sum of the singular values of F_1 F_2^T. That takes no
    root of a matrix which, for fewer images than D, is singular, and can't come out complex.

    Raises:
        ValueError: if D differs, a set has fewer than two images, or a feature isn't finite.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"expected features (N, D) and (M, D), got {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a Frechet distance needs two images per set, got {len(first)} and {len(second)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("expected finite features, got NaN or infinity: make the features of these again")
    factors = _factor(first), _factor(second)
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    variance = sum(float(np.square(factor).sum()) for factor in factors)
    shift = float(np.square(first.mean(axis=0) - second.mean(axis=0)).sum())
    # Equal sets come out as rounding, of either sign.
    return max(0.0, shift + variance - 2 * float(cross))


def _factor(features: Array) -> Array:
    """Return F (min(N, D), D) whose F^T F is the covariance."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    if centred.shape[0] <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


def frechet_from_base(base: Array, tuned: Array, *, seed: int = 0) -> FrechetFromBase | None:
    """Return the Frechet distance of tuned from base images, with its floor.

    Args:
        base: features of the base images, (P prompts, S images, D).
        tuned: features of the tuned images of the same noise, (P, S, D).
        seed: seed of the splits into halves.

    Returns:
        None if half of the images is less than two.
    """
    prompts, images, _ = base.shape
    size = prompts * (images // 2) if images > 1 else prompts // 2
    if size < 2:
        return None
    rng = np.random.default_rng(seed)
    splits = [_halves(prompts, images, rng) for _ in range(SPLITS)]
    flat_base, flat_tuned = (features.reshape(prompts * images, -1) for features in (base, tuned))
    halves = [frechet_distance(flat_base[one], flat_tuned[other]) for one, other in splits]
    floor = [frechet_distance(flat_base[one], flat_base[other]) for one, other in splits]
    whole = frechet_distance(flat_base, flat_tuned)
    return FrechetFromBase(whole, float(np.mean(halves)), float(np.mean(floor)), size)


def _halves(prompts: int, images: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows of two disjoint halves of each prompt's images, or of prompts with one each."""
    if images == 1:
        order = rng.permutation(prompts)
        return order[: prompts // 2], order[prompts // 2 : prompts // 2 * 2]
    order = rng.permuted(np.arange(prompts * images).reshape(prompts, images), axis=1)
    half = images // 2
    return order[:, :half].ravel(), order[:, half : 2 * half].ravel()
