"""The frontier against closed forms: Gaussian rewards, two-valued rewards, all choices of n of N."""

from itertools import combinations

import numpy as np
import pytest

from am_diffusers.evaluation.frontier import (
    MIN_SHARE,
    Frontier,
    best_of_at,
    best_of_kl,
    jackknife,
    log_mean_exp,
)


def gaussian_rewards(prompts=600, images=64, deviation=1.5, seed=0):
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(prompts, 1))
    return means, means + deviation * rng.normal(size=(prompts, images))


def within_errors(values, expected, errors=4.0):
    """Whether the mean of independent values (P,) is `expected` but for its own standard error."""
    return abs(values.mean() - expected) <= errors * values.std(ddof=1) / len(values) ** 0.5


@pytest.mark.parametrize("scale", [0.1, 0.4, 0.8])
def test_the_tilt_of_gaussian_rewards(scale):
    """N(m, s^2) tilts to N(m + scale s^2, s^2): KL scale^2 s^2 / 2; n = 600 prompts, each with its own m."""
    means, rewards = gaussian_rewards()
    means, variance = means[:, 0], 1.5**2
    tilted = Frontier(rewards, {"half": rewards / 2}).tilt(scale)
    assert within_errors(tilted.reward - means, scale * variance)
    assert within_errors(tilted.scores["half"] - means / 2, scale * variance / 2)
    assert within_errors(tilted.log_normaliser - scale * means, scale**2 * variance / 2)
    assert within_errors(tilted.kl, scale**2 * variance / 2)


def test_the_jackknife_takes_the_bias_of_the_normaliser_away():
    means, rewards = gaussian_rewards(prompts=3000, images=16, deviation=0.8)
    exponents, expected = rewards - means, 0.8**2 / 2
    assert within_errors(jackknife(log_mean_exp, exponents), expected)
    assert not within_errors(log_mean_exp(exponents), expected)


def test_a_reward_of_two_values_tilts_the_share_of_the_better():
    share, images, scale = 0.55, 100, 1.3
    rng = np.random.default_rng(1)
    clean = (rng.random((500, images)) < share).astype(float)
    tilted = Frontier(clean, {"spoilt": 1 - clean}).tilt(scale)
    normaliser = share * np.exp(scale) + 1 - share
    after = share * np.exp(scale) / normaliser
    kl = after * np.log(after / share) + (1 - after) * np.log((1 - after) / (1 - share))
    assert within_errors(tilted.reward, after)
    assert within_errors(tilted.scores["spoilt"], 1 - after)
    assert within_errors(tilted.log_normaliser, np.log(normaliser))
    assert within_errors(tilted.kl, kl)
    square = share * np.exp(2 * scale) + 1 - share
    assert tilted.effective_share.mean() == pytest.approx(normaliser**2 / square, abs=0.02)


def test_prompts_have_normalisers_of_their_own():
    """Pooled, the prompt of high rewards would take all weight: its images are no better for their prompt."""
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(2, 64)) + np.array([[0.0], [50.0]])
    alone = [Frontier(row[None], {}).tilt(0.7) for row in rewards]
    together = Frontier(rewards, {}).tilt(0.7)
    assert together.kl == pytest.approx([each.kl[0] for each in alone])
    assert together.effective_share.min() > 0.4
    shifted = Frontier(rewards + np.array([[7.0], [-3.0]]), {}).tilt(0.7)
    assert shifted.kl == pytest.approx(together.kl)


@pytest.mark.parametrize("kl", [1e-3, 0.05, 0.5, 1.2])
def test_a_scale_is_found_by_its_kl(kl):
    frontier = Frontier(gaussian_rewards(prompts=16)[1], {})
    assert frontier.tilt(frontier.scale_at(kl)).kl.mean() == pytest.approx(kl, rel=1e-6)


def test_what_these_images_cannot_tell_is_refused():
    frontier = Frontier(gaussian_rewards(prompts=16)[1], {})
    largest = frontier.tilt(frontier.largest_scale)
    assert largest.effective_share.mean() == pytest.approx(MIN_SHARE)
    with pytest.raises(
        ValueError, match=r"64 a prompt, tell the tilt up to a KL of [\d.]+ nats: 5 is beyond"
    ):
        frontier.scale_at(5)
    with pytest.raises(ValueError, match="same reward"):
        Frontier(np.ones((3, 8)), {})
    with pytest.raises(ValueError, match="finite"):
        Frontier(np.array([[0.0, 1.0, np.nan]]), {})
    with pytest.raises(ValueError, match="prompts, images"):
        Frontier(np.ones((3, 8)), {"other": np.ones((3, 7))})


def test_best_of_n_is_the_mean_over_all_choices():
    rewards = np.random.default_rng(3).normal(size=(2, 7))
    best = Frontier(rewards, {}).best
    for number in range(1, 8):
        chosen = [rewards[:, list(choice)].max(1) for choice in combinations(range(7), number)]
        assert best[:, number - 1] == pytest.approx(np.mean(chosen, 0))


def test_best_of_n_of_thousands_of_images_is_the_best_of_as_many_draws():
    """Choices of 1,000 of 2,000 are beyond the range of float64."""
    rewards = np.random.default_rng(4).normal(size=(1, 2000))
    best = Frontier(rewards, {}).best
    assert np.isfinite(best).all()
    assert best[0, 0] == pytest.approx(rewards.mean())
    assert best[0, -1] == pytest.approx(rewards.max())
    # Half of all are chosen: the largest is among them half of the time, else the next, and so on.
    ordered = np.sort(rewards[0])[::-1]
    assert best[0, 999] == pytest.approx((ordered * 0.5 ** np.arange(1, 2001)).sum(), abs=2e-3)


def test_other_scores_of_the_best_are_those_of_its_image():
    rng = np.random.default_rng(4)
    rewards, others = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    best = Frontier(rewards, {}).of_best(others)
    for number in range(1, 7):
        chosen = [
            [max(choice, key=row.__getitem__) for row in rewards] for choice in combinations(range(6), number)
        ]
        expected = np.mean([[others[row, image] for row, image in enumerate(each)] for each in chosen], 0)
        assert best[:, number - 1] == pytest.approx(expected)


def test_few_images_must_carry_more_of_the_weight():
    """Six of them: 10 % of 64 are enough, of 16 it takes 38 %."""
    rng = np.random.default_rng(5)
    shares = {
        images: Frontier(rng.normal(size=(4, images)), {}).least_share for images in (4, 16, 60, 64, 256)
    }
    assert shares == {4: 0.9, 16: 6 / 16, 60: 0.1, 64: 0.1, 256: 0.1}
    few = Frontier(gaussian_rewards(images=16)[1], {})
    assert few.tilt(few.largest_scale).effective_share.mean() == pytest.approx(6 / 16)
    assert few.largest_scale * 1.5 < 1.6


def test_half_of_the_images_tell_what_a_frontier_of_them_would():
    rewards = gaussian_rewards(prompts=5, images=16)[1]
    halves = [Frontier(rewards[:, half], {}).tilt(0.5).reward for half in (slice(8), slice(8, None))]
    assert Frontier(rewards, {}).told_by_half(0.5) == pytest.approx(np.mean(halves, 0))


def test_kl_of_best_of_n():
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(np.log(4) - 0.75)
    for number in (1.0, 2.0, 7.5, 64.0):
        assert best_of_at(best_of_kl(number)) == pytest.approx(number)
