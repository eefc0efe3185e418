"""Scores of base, tuned model and tilt side by side, against laws whose tilt is known."""

import numpy as np
import pytest

from am_diffusers.evaluation.certificate import Tuned, certify
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.outcomes import outcomes

SCALE = 0.6


def gaussian_scores(prompts: int, images: int, seed: int):
    """A trained reward x and a held-out y with correlation .8, of unit variance, shifted by prompt."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, prompts, images))
    offset = rng.normal(size=(prompts, 1))
    return x + offset, 0.8 * x + 0.6 * noise + offset


def outcome_of(shift: float, seed: int = 0):
    """Outcome of the held-out score when the tuned images' scores are the base's plus a shift."""
    x, y = gaussian_scores(40, 64, seed)
    scores = {"trained": x[:, :16] + shift, "held-out": y[:, :16] + shift}
    return outcomes(Frontier(x, {"trained": x, "held-out": y}), SCALE, scores, known=True)


def test_the_prediction_is_the_tilts_mean_of_the_held_out_score():
    found = outcome_of(0.8 * SCALE)["held-out"]  # E[y] under exp(scale x) is .8 * scale above the base's
    assert found.predicted.value - found.base.value == pytest.approx(0.8 * SCALE, abs=0.07)
    assert found.tuned.value - found.base.value == pytest.approx(0.8 * SCALE, abs=1e-12), (
        "pairs share their noise"
    )
    assert found.surplus.low < 0 < found.surplus.high
    assert found.text().endswith(", no different")


@pytest.mark.parametrize(("shift", "words"), [(0.1, "short of it by 0.3"), (1.0, "beyond it by 0.5")])
def test_a_shortfall_or_an_excess_is_named(shift, words):
    assert words in outcome_of(shift)["held-out"].text()


def test_the_surplus_of_the_tilt_itself_is_significant_as_seldom_as_it_should_be():
    found = [outcome_of(0.8 * SCALE, seed)["held-out"].surplus for seed in range(60)]
    wrong = np.mean([each.low > 0 or each.high < 0 for each in found])
    assert wrong <= 0.05 + 4 * (0.05 * 0.95 / 60) ** 0.5


def test_nothing_is_predicted_where_the_base_images_cannot_tell():
    x, y = gaussian_scores(8, 16, 1)
    tuned = Tuned(x + 1, np.full(x.shape, 0.5), {"y": y})
    found = certify(Frontier(x, {"y": y}), 20.0, tuned, resamples=99)
    assert found.outcomes["y"].predicted is None
    assert "tilt" not in found.outcomes["y"].text()
    assert found.to_dict()["outcomes"]["y"]["base"]["value"] == pytest.approx(y.mean())
    assert any(line.startswith("y by the chain of training:") for line in found.headline())


def test_the_interval_of_a_share_ends_at_one():
    rng = np.random.default_rng(2)
    share = (rng.random((6, 16)) < 0.9).astype(float)
    share[0] = 1
    rewards = rng.normal(size=(6, 16))
    found = outcomes(Frontier(rewards, {"share": share}), SCALE, {"share": np.ones((6, 8))}, known=True)[
        "share"
    ]
    assert found.tuned.high == 1
    assert found.predicted.high <= 1
    assert found.surplus.high > 0, "a difference has no such end"
