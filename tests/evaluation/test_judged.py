"""Shares and diversity among the clean images of an evaluation."""

import numpy as np
import pytest

from am_diffusers.evaluation.held_out import summarise
from am_diffusers.evaluation.judged import judge
from am_diffusers.evaluation.pairs import PairScore

RNG = np.random.default_rng


def scores_of(clean: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    return {"world_clean": clean.astype(float), "world_right": right.astype(float)}


def test_right_images_are_counted_among_the_clean_ones_of_all_prompts():
    clean = np.array([[[1, 1], [0, 1]], [[1, 1], [1, 1]]])
    right = np.array([[[1, 1], [1, 0]], [[0, 1], [1, 1]]])  # the spoilt image that is right doesn't count
    found = judge(scores_of(clean, right), None)
    assert (found.right_base, found.right_tuned) == (pytest.approx(2 / 3), pytest.approx(3 / 4))
    assert found.right.value == pytest.approx(3 / 4 - 2 / 3)
    assert found.diversity is None


def test_diversity_is_that_of_pairs_of_good_images():
    directions = np.eye(3)
    features = np.zeros((2, 3, 2, 3))
    features[:, :, 0] = directions  # base: all at distance 1
    features[:, :, 1] = directions[[0, 0, 1]]  # tuned: 0 between the first two, else 1
    everything = np.ones((2, 3, 2))
    found = judge(scores_of(everything, everything), 7 * features)
    assert found.diversity.value == pytest.approx(2 / 3)
    without_the_third = everything.copy()
    without_the_third[:, 2, 1] = 0
    found = judge(scores_of(everything, without_the_third), features)
    assert found.diversity.value == pytest.approx(0, abs=1e-12)


def test_a_run_that_asks_the_judge_is_told_in_its_last_lines():
    rng = RNG(0)
    pairs = [
        PairScore(p, i, {"world_clean": (1.0, 1.0), "world_right": (float(i), 1.0)}, rng.normal(size=(2, 4)))
        for p in range(4)
        for i in range(2)
    ]
    evaluation = summarise(pairs, dict.fromkeys(("world_clean", "world_right"), "held-out"), "hpsv2")
    assert "right among clean images: +50.0 points" in "\n".join(evaluation.headline())
    assert evaluation.to_dict()["judged"]["right_tuned"] == 1


@pytest.mark.parametrize("missing", ["world_clean", "world_right"])
def test_without_both_answers_nothing_is_judged(missing):
    scores = scores_of(np.ones((2, 2, 2)), np.ones((2, 2, 2)))
    del scores[missing]
    assert judge(scores, None) is None


def test_a_model_without_clean_images_is_not_judged():
    clean = np.ones((2, 2, 2))
    clean[:, :, 0] = 0
    assert judge(scores_of(clean, clean), None) is None
