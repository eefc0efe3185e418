"""Sums of rewards: scales, parts kept for the log, wrong input."""

import math

import pytest
import torch

from am_diffusers.rewards import Brightness, JpegSize, RewardScale, WeightedRewards
from reward_pictures import random_images


def test_weighted_sum() -> None:
    images, prompts = random_images(2, 8, 8), ["a", "b"]
    brightness, size = Brightness()(images, prompts), JpegSize()(images, prompts)
    reward = WeightedRewards([Brightness(), JpegSize()], [RewardScale(2.0, 0.5, 0.1), RewardScale(-0.5)])
    expected = 2 * (brightness - 0.5) / 0.1 - 0.5 * size
    assert torch.allclose(reward(images, prompts), expected)
    assert reward.name == "brightness+jpeg_size"
    assert not reward.differentiable
    assert WeightedRewards([Brightness()], [RewardScale()]).differentiable


def test_weighted_sum_keeps_the_scores_of_its_parts_once() -> None:
    images, prompts = random_images(3, 8, 8), ["a", "b", "c"]
    reward = WeightedRewards([Brightness(), JpegSize()], [RewardScale(2.0, 0.5, 0.1), RewardScale()])
    assert reward.drain() == {}
    reward(images[:2].requires_grad_(), prompts[:2])
    reward(images[2:], prompts[2:])
    seen = reward.drain()
    assert list(seen) == ["brightness", "jpeg_size"]
    assert torch.equal(seen["brightness"], Brightness()(images, prompts))
    assert not seen["brightness"].requires_grad
    assert reward.drain() == {}


@pytest.mark.parametrize(
    ("rewards", "count", "message"),
    [
        ([], 0, "one weight per reward"),
        ([Brightness()], 2, "one weight per reward"),
        ([Brightness(), Brightness()], 2, "different names"),
    ],
)
def test_bad_sums_are_refused(rewards: list[Brightness], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedRewards(rewards, [RewardScale()] * count)


@pytest.mark.parametrize("numbers", [(math.nan, 0, 1), (1, math.inf, 1), (1, 0, 0), (1, 0, math.nan)])
def test_bad_scales_are_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="finite weight and mean and a std > 0"):
        RewardScale(*numbers)
