"""Paired comparisons: against scipy, by hand, and on scored images without and with a planted effect.

The bank (tests/data/score_bank.json, written by scripts/assets/score_bank.py) holds 56 prompts x 12 base
images. Trials use 499 resamples instead of 9999, for time.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from am_diffusers.evaluation.statistics import Estimate, compare, diversity_kept, estimate

RNG = np.random.default_rng
BANK = json.loads((Path(__file__).parents[1] / "data" / "score_bank.json").read_text())["scores"]
TRIALS = 500


def ends(result: Estimate) -> tuple[float, float]:
    assert result.low is not None
    assert result.high is not None
    return result.low, result.high


def excludes(result: Estimate, null: float) -> bool:
    low, high = ends(result)
    return low > null or high < null


# Against scipy and by hand.


def test_numbers_of_three_prompts_by_hand():
    base = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    tuned = np.array([[2.0, 2.0], [3.0, 5.0], [4.0, 9.0]])
    result = compare(base, tuned)
    assert (result.num_prompts, result.images_per_prompt) == (3, 2)
    assert (result.base_mean, result.tuned_mean) == pytest.approx((3.5, 25 / 6))
    assert result.base_sd == pytest.approx(math.sqrt(3.5))
    assert result.difference.value == pytest.approx(2 / 3)
    assert result.gain is not None
    assert result.gain.value == pytest.approx(2 / 3 / math.sqrt(3.5))
    # Wins: 1, tie; tie, 1; 0, 1.
    assert result.win_rate.value == pytest.approx((1 + 0.5 + 0.5 + 1 + 0 + 1) / 6)
    assert 0 <= ends(result.win_rate)[0] <= ends(result.win_rate)[1] <= 1


def test_swapped_models_give_the_opposite():
    base, tuned = RNG(0).normal(size=(2, 40, 3))
    forth, back = compare(base, tuned, unit=1.0), compare(tuned, base, unit=1.0)
    assert back.difference.value == pytest.approx(-forth.difference.value)
    assert ends(back.difference) == pytest.approx([-end for end in ends(forth.difference)[::-1]], abs=0.02)
    assert back.win_rate.value == pytest.approx(1 - forth.win_rate.value)
    assert back.p_value == pytest.approx(forth.p_value)


@pytest.mark.parametrize("number", [6, 20, 200])
def test_p_value_is_scipys_for_the_prompts_means(number):
    base = RNG(1).normal(size=(number, 4))
    tuned = base + RNG(2).normal(0.3, 1, size=(number, 4))
    expected = stats.wilcoxon(tuned.mean(axis=1), base.mean(axis=1)).pvalue
    assert compare(base, tuned).p_value == pytest.approx(expected, rel=1e-9)


def test_unchanged_scores_are_no_difference():
    base = RNG(3).normal(size=(30, 2))
    result = compare(base, base)
    assert (result.p_value, result.win_rate.value, result.significant) == (1, 0.5, False)
    assert result.difference == Estimate(0, 0, 0)


def test_large_effect_is_significant_and_its_sign_is_kept():
    base = RNG(4).normal(size=(30, 2))
    for shift in (-1.0, 1.0):
        result = compare(base, base + shift + RNG(5).normal(size=(30, 2)))
        assert result.significant
        assert math.copysign(1, ends(result.difference)[0]) == shift


def test_significance_needs_both_the_interval_and_the_test():
    """Ranks against the mean: most prompts gain a little, one loses more than all gained."""
    base = np.zeros((40, 1))
    tuned = base + RNG(6).uniform(0.5, 1, size=(40, 1))
    assert compare(base, tuned).significant
    tuned[0] = -100
    result = compare(base, tuned)
    assert result.p_value < 0.05
    assert not excludes(result.difference, 0)
    assert not result.significant


# For two prompts a resample is one of them or their mean: a half width of 4.58 |a - b|, where t's is 6.35.
COVERAGE = {2: 1 - 2 / math.pi * math.atan(1 / 9.168), 3: 0.95, 5: 0.95, 10: 0.95, 40: 0.95}


@pytest.mark.parametrize("number", COVERAGE)
def test_interval_of_normal_data_covers_their_mean(number):
    """Of 1000 sets, within four standard errors; the plain percentile interval covers 50 % for two."""
    data = RNG(7).normal(0.3, 1, size=(1000, number))
    intervals = np.array([ends(estimate(np.mean, row, resamples=499)) for row in data])
    inside = ((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)).mean()
    expected = COVERAGE[number]
    assert inside == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1000))


def test_interval_agrees_with_the_t_interval_of_many_prompts():
    base = RNG(8).normal(5, 2, size=(300, 4))
    tuned = base + RNG(9).normal(0.5, 1, size=(300, 4))
    differences = (tuned - base).mean(axis=1)
    expected = stats.t.interval(0.95, 299, differences.mean(), stats.sem(differences))
    assert ends(compare(base, tuned).difference) == pytest.approx(expected, abs=0.01)


def test_interval_ends_where_the_statistic_does():
    wins = np.array([1.0, 1.0, 0.75, 1.0])
    assert ends(estimate(np.mean, wins))[1] > 1
    assert ends(estimate(np.mean, wins, span=(0, 1)))[1] == 1
    assert ends(compare(np.zeros((4, 4)), wins[:, None] > [0.2, 0.5, 0.7, 0.9]).win_rate)[1] == 1


# What can't be computed.


def test_one_prompt_has_values_and_no_interval():
    result = compare(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]]))
    assert result.difference == Estimate(1.5, None, None)
    assert result.win_rate == Estimate(1.0, None, None)
    assert (result.p_value, result.significant) == (1, False)


def test_constant_base_has_no_unit_unless_one_is_given():
    base, tuned = np.full((5, 2), 0.1), RNG(10).normal(size=(5, 2))
    assert (compare(base, tuned).base_sd, compare(base, tuned).gain) == (None, None)
    gain = compare(base, tuned, unit=2.0).gain
    assert gain is not None
    assert gain.value == pytest.approx((tuned - base).mean() / 2)


def test_gains_of_parts_in_the_unit_of_the_whole_average_to_its_gain():
    base, tuned = RNG(11).normal(size=(2, 12, 3))
    whole = compare(base, tuned)
    parts = [compare(base[rows], tuned[rows], unit=whole.base_sd) for rows in (slice(0, 4), slice(4, 12))]
    gains = [part.gain.value for part in parts if part.gain is not None]
    assert whole.gain is not None
    assert np.average(gains, weights=[4, 8]) == pytest.approx(whole.gain.value)


def test_ratio_without_a_value_in_some_resamples_has_no_interval():
    """All distances but one are 0: many resamples leave that one out."""
    base, tuned = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.5])
    assert diversity_kept(base, tuned) == Estimate(0.5, None, None)


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2)), "alike"),
        (np.zeros(3), np.zeros(3), "alike"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "alike"),
        (np.zeros((3, 2)), np.full((3, 2), np.nan), "finite"),
    ],
)
def test_scores_that_cannot_be_compared_are_an_error(base, tuned, message):
    with pytest.raises(ValueError, match=message):
        compare(base, tuned)


# On the bank of scored images.


def draws(name, num_prompts, images, seed):
    """`TRIALS` pairs of (P, S) scores of base images, each on one side; beyond its size, prompts repeat."""
    bank, rng = np.array(BANK[name]), RNG(seed)
    for _ in range(TRIALS):
        rows = (
            rng.integers(0, len(bank), num_prompts) if num_prompts > len(bank) else rng.permutation(len(bank))
        )
        pictures = rng.permuted(bank[rows[:num_prompts]], axis=1)[:, : 2 * images]
        yield pictures[:, :images], pictures[:, images:]


@pytest.mark.parametrize(
    ("name", "num_prompts", "images", "seed"),
    [
        ("pickscore", 56, 4, 0),
        ("hpsv2", 56, 4, 1),
        ("pickscore", 200, 4, 2),
        ("pickscore", 8, 4, 4),
    ],
)
def test_base_against_base_is_seldom_significant(name, num_prompts, images, seed):
    results = [compare(*pair, resamples=499) for pair in draws(name, num_prompts, images, seed)]
    by_interval = np.mean([excludes(result.difference, 0) for result in results])
    by_rank = np.mean([result.p_value < 0.05 for result in results])
    by_wins = np.mean([excludes(result.win_rate, 0.5) for result in results])
    assert 0.01 <= by_interval <= 0.09
    assert 0.01 <= by_rank <= 0.09
    assert 0.01 <= by_wins <= 0.09
    assert np.mean([result.significant for result in results]) <= min(by_interval, by_rank)


@pytest.mark.parametrize(("name", "images"), [("pickscore", 4), ("hpsv2", 2)])
def test_effect_of_a_fifth_of_the_spread_is_found_with_200_prompts(name, images):
    """Even of pictures from other noise (with only one a prompt, of hpsv2, in 77 % of the trials)."""
    effect = 0.2 * np.array(BANK[name]).std(ddof=1)
    results = [compare(b, t + effect, resamples=499) for b, t in draws(name, 200, images, 6)]
    assert np.mean([result.significant for result in results]) >= 0.8
    assert np.mean([result.p_value < 0.05 for result in results]) >= 0.8
    gains = [result.gain.value for result in results if result.gain is not None]
    assert np.mean(gains) == pytest.approx(0.2, abs=0.03)
