import json

import numpy as np
import pytest
from scipy import stats

from am_diffusers.evaluation import PairScore, bootstrap, diversity, pairwise_distance, reward_gain, summarise

RNG = np.random.default_rng


def test_a_constant_shift_is_recovered_exactly_with_an_interval_of_no_width():
    base = RNG(0).normal(5, 2, (40, 4))
    result = reward_gain(base, base + 1.5, "trained")
    expected = 1.5 / base.std(ddof=1)
    assert [result.gain.value, result.gain.low, result.gain.high] == pytest.approx([expected] * 3, rel=1e-9)
    assert result.tuned_mean - result.base_mean == pytest.approx(1.5)


def test_interval_is_that_of_the_mean_over_prompts():
    """Against the t interval of the same prompt means: n = 300, so the two agree to a few per cent."""
    means = RNG(1).normal(0.3, 1, 300)
    interval = bootstrap(np.mean, means)
    low, high = stats.t.interval(0.95, 299, means.mean(), stats.sem(means))
    assert interval.value == pytest.approx(means.mean(), abs=1e-12)
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=0.01)


def test_pictures_of_one_prompt_do_not_count_as_independent():
    """Prompt-level differences: four copies of a picture may not narrow the interval."""
    base = np.repeat(RNG(2).normal(size=(50, 1)), 4, axis=1)
    tuned = base + np.repeat(RNG(3).normal(size=(50, 1)), 4, axis=1)
    many, one = reward_gain(base, tuned, "x"), reward_gain(base[:, :1], tuned[:, :1], "x")
    width = [r.gain.high * r.base_sd - r.gain.low * r.base_sd for r in (many, one)]
    assert width[0] == pytest.approx(width[1], rel=1e-9)


def test_pairwise_distance_of_known_vectors():
    same = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    mixed = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    assert pairwise_distance(np.array([same, mixed])) == pytest.approx([0.0, (1 + 1 + 2) / 3])


def test_diversity_kept_of_unchanged_and_of_collapsed_pictures():
    base = RNG(4).normal(size=(20, 4, 8))
    unchanged, collapsed = diversity("f", base, base), diversity("f", base, base[:, :1].repeat(4, axis=1))
    assert (unchanged.kept.low, unchanged.kept.value, unchanged.kept.high) == (1, 1, 1)
    assert collapsed.kept.value == pytest.approx(0, abs=1e-12)


def test_no_spread_in_the_base_is_an_error():
    with pytest.raises(ValueError, match="no spread"):
        reward_gain(np.ones((3, 2)), np.zeros((3, 2)), "held-out")


def make_pairs():
    rng = RNG(5)
    return [
        PairScore(p, s, {"a": (base := rng.normal(), base + 1), "b": (base, -base)}, rng.normal(size=(2, 6)))
        for p in range(5)
        for s in range(3)
    ]


def test_summary_does_not_depend_on_the_order_of_the_pairs():
    pairs, roles = make_pairs(), {"a": "trained", "b": "held-out"}
    summary = summarise(pairs, roles, "b")
    assert summary == summarise(pairs[::-1], roles, "b")
    assert (summary.num_prompts, summary.images_per_prompt, list(summary.rewards)) == (5, 3, ["a", "b"])
    stacked = np.stack([pair.features for pair in pairs]).reshape(5, 3, 2, 6)
    assert summary.diversity == diversity("b", stacked[:, :, 0], stacked[:, :, 1])
    json.dumps(summary.to_dict(), allow_nan=False)


def test_headline_names_reward_interval_and_diversity():
    lines = summarise(make_pairs(), {"a": "trained", "b": "held-out"}, "b").headline()
    assert [line.split(":")[0] for line in lines] == [
        "trained reward a",
        "held-out reward b",
        "diversity kept (b image features)",
    ]
    assert all("[" in line for line in lines)
    assert len(summarise(make_pairs(), {"a": "trained"}, None).headline()) == 1
