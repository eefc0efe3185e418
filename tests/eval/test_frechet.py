"""The Frechet distance: against its closed forms and the formula with a matrix root, and its floor."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from evaluating.summary.frechet import frechet_distance, frechet_from_base

RNG = np.random.default_rng


def with_moments(number, mean, factor, seed):
    """Features (number, D) whose mean and covariance, factor^T factor, are exact."""
    noise = RNG(seed).normal(size=(number, len(mean)))
    noise -= noise.mean(axis=0)
    whitened = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T)).T)
    return mean + whitened @ factor


def by_matrix_root(first, second):
    shift = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    one, other = np.cov(first.T), np.cov(second.T)
    return shift + np.trace(one + other - 2 * sqrtm(one @ other).real)


def test_distance_of_commuting_covariances_is_that_of_their_standard_deviations():
    stds, others = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.1])
    first = with_moments(50, np.array([1.0, 0, 0]), np.diag(stds), 0)
    second = with_moments(70, np.array([0, 2.0, 0]), np.diag(others), 1)
    expected = 5 + np.square(stds - others).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("number", "other"), [(40, 60), (200, 12), (8, 30)])
def test_distance_is_that_of_the_formula_with_a_matrix_root(number, other):
    """Also for fewer pictures than features, where scipy's root is of a singular matrix: less exact."""
    first = RNG(2).normal(size=(number, 10)) @ RNG(3).normal(size=(10, 10))
    second = 0.3 + RNG(4).normal(size=(other, 10)) @ RNG(5).normal(size=(10, 10))
    tolerance = 1e-10 if min(number, other) > 10 else 1e-5
    assert frechet_distance(first, second) == pytest.approx(by_matrix_root(first, second), rel=tolerance)


def test_fewer_pictures_than_features_in_a_subspace_by_hand():
    """Both sets on one line through D = 1000: a Gaussian of one dimension."""
    line = np.zeros(1000)
    line[::7] = 1 / np.sqrt(143)
    first, second = np.outer([1.0, 2, 3, 4], line), np.outer([0.0, 5, 10], line)
    spreads = np.std([1.0, 2, 3, 4], ddof=1), np.std([0.0, 5, 10], ddof=1)
    expected = (2.5 - 5) ** 2 + (spreads[0] - spreads[1]) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_distance_of_a_set_from_itself_moved_and_rotated():
    features = RNG(6).normal(size=(30, 100))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(features, features + 0.5) == pytest.approx(25, rel=1e-10)
    rotation = np.linalg.qr(RNG(7).normal(size=(100, 100)))[0]
    other = RNG(8).normal(size=(20, 100))
    turned = frechet_distance(features @ rotation, other @ rotation)
    assert turned == pytest.approx(frechet_distance(features, other), rel=1e-10)


def test_distance_is_biased_by_the_size_of_the_sets_and_the_floor_shows_it():
    """One law, D = 32: the distance of two draws, 0 in the limit, is most of the trace for 64 pictures."""
    found = [frechet_distance(*RNG(9).normal(size=(2, number, 32))) for number in (64, 512)]
    assert found[0] > 5 * found[1] > 1
    base, other = RNG(10).normal(size=(2, 64, 4, 32))
    result = frechet_from_base(base, other)
    assert result is not None
    assert result.pictures_per_half == 128
    assert result.halves == pytest.approx(result.floor, rel=0.1)
    assert result.floor > 2


def test_unchanged_pictures_are_at_the_floor_and_moved_ones_above_by_the_move():
    base = RNG(11).normal(size=(40, 4, 16))
    same, moved = frechet_from_base(base, base), frechet_from_base(base, base + 1)
    assert same is not None
    assert moved is not None
    assert (same.distance, same.halves) == (pytest.approx(0, abs=1e-10), same.floor)
    assert moved.distance == pytest.approx(16, rel=1e-10)
    assert moved.halves - moved.floor == pytest.approx(16, rel=0.1)


def test_halves_share_prompts_and_no_picture():
    """Prompts far apart: a half without one of them would be far from the other."""
    prompts = 100 * RNG(12).normal(size=(10, 1, 8))
    result = frechet_from_base(*[prompts + RNG(seed).normal(size=(10, 5, 8)) for seed in (13, 14)])
    assert result is not None
    assert result.pictures_per_half == 20
    assert result.floor < 8
    assert result.floor > 0.01


def test_one_picture_a_prompt_is_halved_by_prompts_and_too_few_pictures_are_none():
    result = frechet_from_base(*RNG(15).normal(size=(2, 9, 1, 4)))
    assert result is not None
    assert result.pictures_per_half == 4
    for prompts, images in ((1, 3), (3, 1), (1, 1)):
        assert frechet_from_base(*RNG(16).normal(size=(2, prompts, images, 4))) is None


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), "features"),
        (np.zeros((1, 2)), np.zeros((3, 2)), "two images"),
        (np.full((3, 2), np.inf), np.zeros((3, 2)), "finite"),
    ],
)
def test_features_without_a_distance_are_an_error(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)
