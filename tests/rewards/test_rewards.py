"""Gradients, batching, text cache and input checks of the rewards."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from am_diffusers.rewards import (
    REWARDS,
    Brightness,
    ClipReward,
    HPSv2,
    ImageFeatures,
    JpegSize,
    LearnedReward,
    PickScore,
    RewardOptions,
)
from reward_models import (
    CAPTIONS,
    SIZE,
    save_aesthetic,
    save_clip_score,
    save_hpsv2,
    save_image_reward,
    save_pickscore,
)
from reward_pictures import random_images

Load = Callable[..., LearnedReward]
LoadClip = Callable[..., ClipReward]
SAVE = {
    "pickscore": save_pickscore,
    "hpsv2": save_hpsv2,
    "clip_score": save_clip_score,
    "aesthetic": save_aesthetic,
    "image_reward": save_image_reward,
}
LONG = " and ".join(CAPTIONS)


@pytest.fixture(scope="module", params=SAVE)
def load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`from_pretrained` of one small reward, with its folder filled in."""
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["pickscore", "hpsv2", "clip_score"])
def load_clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The same of the rewards that compare the features of two towers."""
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def saved(name: str, folder: Path) -> Load:
    SAVE[name](folder)
    return lambda **options: REWARDS[name].from_pretrained(folder, options=RewardOptions(**options))


def gradient_of(reward: LearnedReward, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    prompts = [CAPTIONS[row % len(CAPTIONS)] for row in range(len(images))]
    return torch.autograd.grad(reward(images, prompts).sum(), images)[0]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (20, 27), (SIZE, SIZE)])
def test_gradient_is_that_of_the_score(load: Load, height: int, width: int) -> None:
    reward = load(dtype=torch.float64)
    images = random_images(2, height, width, torch.float64)
    gradient, step = gradient_of(reward, images), 1e-4
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        above, below = (reward(images + s * step * direction, CAPTIONS[:2]).sum() for s in (1, -1))
        expected = (gradient * direction).sum().item()
        assert ((above - below) / (2 * step)).item() == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_rounding_passes_gradients_straight_through(load: Load) -> None:
    images = random_images(2, 48, 64)
    rounded, plain = gradient_of(load(mode="rounded"), images), gradient_of(load(), images)
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), plain.flatten(), dim=0) > 0.99


def test_pickscore_ignores_what_it_crops(tmp_path: Path) -> None:
    save_pickscore(tmp_path)
    gradient = gradient_of(PickScore.from_pretrained(tmp_path), random_images(1, SIZE, SIZE + 20))
    assert bool((gradient[..., 10:-10] != 0).all())
    assert not gradient[..., :10].any()
    assert not gradient[..., -10:].any()


def test_hpsv2_sees_every_pixel(tmp_path: Path) -> None:
    save_hpsv2(tmp_path)
    assert bool((gradient_of(HPSv2.from_pretrained(tmp_path), random_images(1, 50, 70)) != 0).all())


def test_official_mode_has_no_gradient(load: Load) -> None:
    reward = load(mode="official")
    assert not reward.differentiable
    assert not reward(random_images(1, 40, 40).requires_grad_(), CAPTIONS[:1]).requires_grad


def saved_numbers(reward: LearnedReward, images: Tensor) -> int:
    """Numbers that autograd holds after scoring, model weights not counted."""
    saved: dict[int, int] = {}
    weights = {id(parameter.untyped_storage()) for parameter in reward.network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor.untyped_storage()) not in weights:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reward(images.clone().requires_grad_(), CAPTIONS[: len(images)])
    return sum(saved.values())


def test_image_features_have_length_one(load: Load) -> None:
    """Equal for equal pictures whatever the batch, and different for different ones."""
    reward, images = load(batch_size=2), random_images(3, 48, 64)
    assert isinstance(reward, ImageFeatures)
    features = reward.image_features(torch.cat([images, images[:1]]))
    assert torch.allclose(features.norm(dim=-1), torch.ones(4))
    assert torch.allclose(features[3], features[0], atol=1e-6)
    assert not torch.allclose(features[1], features[0], atol=1e-3)
    assert not isinstance(Brightness(), ImageFeatures)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_change_nothing(load: Load, checkpointing: bool) -> None:
    images = random_images(3, 48, 64)
    whole, split = load(), load(batch_size=2, checkpointing=checkpointing)
    prompts = CAPTIONS[:3]
    assert torch.allclose(split(images, prompts), whole(images, prompts), rtol=1e-5, atol=1e-6)
    expected = gradient_of(whole, images)
    difference = gradient_of(split, images) - expected
    assert difference.abs().max() < 1e-5 * expected.abs().max()


def test_checkpointing_holds_little(load: Load) -> None:
    images = random_images(4, SIZE, SIZE)
    plain, checkpointed = (
        saved_numbers(load(batch_size=1, checkpointing=on), images) for on in (False, True)
    )
    assert plain > 4 * images.numel()
    assert checkpointed <= images.numel() + 10 * len(images) * 16  # the inputs and a few of the features


def test_half_precision_towers_score_in_float32(load: Load) -> None:
    images = random_images(3, 48, 64)
    scores = load(dtype=torch.bfloat16)(images, CAPTIONS[:3])
    assert scores.dtype == torch.float32
    full = load()(images, CAPTIONS[:3])
    assert torch.allclose(scores, full, atol=max(0.01, 0.05 * full.abs().max().item()))
    assert not torch.equal(scores, full)


def test_scale_keeps_its_precision_in_half_precision_towers(tmp_path: Path) -> None:
    scale = save_pickscore(tmp_path).logit_scale.exp().item()
    assert PickScore.from_pretrained(tmp_path, options=RewardOptions(dtype=torch.bfloat16)).scale == scale


def test_weights_are_frozen(load: Load) -> None:
    reward = load()
    reward(random_images(1, 40, 40).requires_grad_(), CAPTIONS[:1]).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in reward.network.parameters())
    assert not reward.network.training


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
    """A run that goes on remembers other prompts than one that never stopped."""
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


BAD_IMAGES = {
    "one image": (torch.rand(3, 8, 8), r"\(B, 3, H, W\).*\(3, 8, 8\)"),
    "three dimensions": (torch.rand(2, 3, 8), r"\(B, 3, H, W\).*\(2, 3, 8\)"),
    "channels last": (torch.rand(2, 8, 8, 3), r"\(B, 3, H, W\)"),
    "bytes": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating-point"),
    "empty": (torch.zeros(2, 3, 0, 8), r"\(B, 3, H, W\)"),
    "minus one to one": (torch.rand(2, 3, 8, 8) - 0.5, r"in \[0, 1\], got \[-0\."),
    "up to 255": (torch.full((2, 3, 8, 8), 255.0), r"in \[0, 1\], got \[255, 255\]"),
    "NaN": (torch.tensor([0.5, math.nan]).view(2, 1, 1, 1).expand(2, 3, 8, 8), r"rows \[1\]"),
    "infinite": (torch.tensor([math.inf, 0.5]).view(2, 1, 1, 1).expand(2, 3, 8, 8), r"rows \[0\]"),
}
BAD_PROMPTS = {
    "one string": ("ab", "one string"),
    "too few": (["a"], "1 prompts for 2 images"),
    "empty": (["a", "  "], r"empty ones in rows \[1\]"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(load: Load, case: str) -> None:
    images, message = BAD_IMAGES[case]
    for reward in (load(), Brightness(), JpegSize()):
        with pytest.raises(ValueError, match=message):
            reward(images, CAPTIONS[:2])


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_are_refused(load: Load, case: str) -> None:
    prompts, message = BAD_PROMPTS[case]
    for reward in (load(), Brightness(), JpegSize()):
        with pytest.raises(ValueError, match=message):
            reward(random_images(2, 8, 8), prompts)


def test_brightness_and_jpeg_size() -> None:
    images = torch.stack([torch.full((3, 32, 32), 0.25), torch.rand(3, 32, 32)]).requires_grad_()
    brightness = Brightness()(images, ["a", "b"])
    assert brightness[0].item() == pytest.approx(0.25)
    assert torch.autograd.grad(brightness.sum(), images)[0].eq(1 / (3 * 32 * 32)).all()
    flat, noisy = JpegSize()(images, ["a", "b"]).tolist()
    assert 300 < flat < noisy
    assert not JpegSize.differentiable


def test_rewards_are_listed_by_name() -> None:
    packaged, pixels = {"ocr", "imagenet_class"}, {"brightness", "colourfulness", "symmetry", "jpeg_size"}
    assert set(REWARDS) == {*SAVE, *packaged, *pixels}
    assert all(kind.name == name for name, kind in REWARDS.items())
