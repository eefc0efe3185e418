"""Rewards of two towers: remembered text features, long prompts, what the image tower sees, the scale."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from am_diffusers.rewards import (
    REWARDS,
    ClipReward,
    HPSv2,
    LearnedReward,
    PickScore,
    RewardOptions,
)
from reward_models import (
    CAPTIONS,
    SIZE,
    save_pickscore,
)
from reward_pictures import random_images

LoadClip = Callable[..., ClipReward]
LONG = " and ".join(CAPTIONS)


@pytest.fixture(params=["pickscore", "hpsv2", "clip_score"])
def load_clip(request: pytest.FixtureRequest, small_rewards: Path) -> LoadClip:
    """`from_pretrained` of one small reward."""
    folder = small_rewards / request.param
    return lambda **options: REWARDS[request.param].from_pretrained(folder, options=RewardOptions(**options))


def gradient_of(reward: LearnedReward, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    prompts = [CAPTIONS[row % len(CAPTIONS)] for row in range(len(images))]
    return torch.autograd.grad(reward(images, prompts).sum(), images)[0]


def test_pickscore_ignores_what_it_crops(small_rewards: Path) -> None:
    reward = PickScore.from_pretrained(small_rewards / "pickscore")
    gradient = gradient_of(reward, random_images(1, SIZE, SIZE + 20))
    assert bool((gradient[..., 10:-10] != 0).all())
    assert not gradient[..., :10].any()
    assert not gradient[..., -10:].any()


def test_hpsv2_sees_every_pixel(small_rewards: Path) -> None:
    reward = HPSv2.from_pretrained(small_rewards / "hpsv2")
    assert bool((gradient_of(reward, random_images(1, 50, 70)) != 0).all())


def test_scale_keeps_its_precision_in_half_precision_towers(tmp_path: Path) -> None:
    scale = save_pickscore(tmp_path).logit_scale.exp().item()
    assert PickScore.from_pretrained(tmp_path, options=RewardOptions(dtype=torch.bfloat16)).scale == scale


def test_prompts_are_encoded_once(load_clip: LoadClip, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, encoded = load_clip(batch_size=2), []
    encode = reward._encode_prompts

    def watched(prompts: list[str]) -> Tensor:
        assert not torch.is_grad_enabled()
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(reward, "_encode_prompts", watched)
    for prompts in (CAPTIONS[:3], CAPTIONS[::-1], [CAPTIONS[0]] * 5):
        features = reward.text_features(prompts)
    assert sorted(encoded) == sorted(CAPTIONS)
    assert len(reward._remembered) == len(CAPTIONS)
    assert features.shape == (5, 16)
    assert not features.requires_grad


def test_text_of_a_batch_is_that_of_each_prompt(load_clip: LoadClip) -> None:
    """Padding in a batch must not leak into the features."""
    reward = load_clip()
    together = torch.nn.functional.normalize(reward._encode_prompts(CAPTIONS), dim=-1)
    assert torch.allclose(together, reward.text_features(CAPTIONS), atol=1e-6)


def test_text_features_are_the_same_bits_whatever_came_before(load_clip: LoadClip) -> None:
    """A resumed run remembers other prompts than one that never stopped."""
    fresh, used = load_clip(), load_clip()
    used.text_features(CAPTIONS[:1])
    used.text_features(CAPTIONS[1:3])
    assert torch.equal(fresh.text_features(CAPTIONS), used.text_features(CAPTIONS))


def test_text_cached_in_inference_mode_is_usable_in_training(load_clip: LoadClip) -> None:
    reward = load_clip()
    with torch.inference_mode():
        reward.text_features(CAPTIONS)
    assert gradient_of(reward, random_images(2, 40, 40)).abs().sum() > 0


def test_long_prompts_are_cut_counted_and_logged_once(
    load_clip: LoadClip, caplog: pytest.LogCaptureFixture
) -> None:
    reward = load_clip()
    with caplog.at_level(logging.WARNING):
        features = reward.text_features([LONG, LONG + " again", LONG, CAPTIONS[0]])
        reward.text_features([LONG, "again " + LONG])
    assert reward.truncated_prompts == 3
    assert len(caplog.records) == 1
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[3])


def test_a_prompt_that_just_fits_is_not_cut(load_clip: LoadClip) -> None:
    reward = load_clip()
    reward.text_features(["a " * (reward.context_length - 2)])
    assert reward.truncated_prompts == 0
    reward.text_features(["a " * (reward.context_length - 1)])
    assert reward.truncated_prompts == 1
