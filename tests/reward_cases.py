"""One row a reward for the contract test: its images, accuracy and damage. A new reward costs a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from am_diffusers.rewards import REWARDS, LearnedReward, Reward, RewardOptions
from am_diffusers.rewards.parts.packaged import PACKAGED
from reward_models import SAVE, SIZE
from reward_pictures import random_images
from text_pictures import picture_of

# Every reward can score them: an ImageNet class, a quoted text, few tokens.
PROMPTS = ['goldfish "Ho"', 'a castle "Hi"', 'teapot "OK"', 'a red fox "A"']


@dataclass(frozen=True)
class Damage:
    """Edits of a weight file that a loader must refuse.

    Attributes:
        file: the weight file in the folder.
        drop: key to leave out.
        add: key to add.
        resize: key whose tensor gets another shape.
        message: error about that shape.
    """

    file: str
    drop: str
    add: str
    resize: str
    message: str


@dataclass(frozen=True)
class Case:
    """Needs of one reward in the contract test.

    Attributes:
        prompts: prompts that the reward can score.
        images: makes images of (count, height, width, dtype).
        shapes: heights and widths at which the gradient is checked.
        many: number of images in a batch, at least 2.
        count: number of images whose gradient is checked.
        directions: number of directions of central differences.
        step: length of a central difference; small where the network has kinks.
        accuracy: allowed relative error of the gradient.
        rtol: allowed difference between batches, relative to the score.
        atol: the same, absolute.
        damage: edits of the small weights that must be refused.
        missing: error about weights that aren't there.
        nowhere: places without weights.
        beside: keyword arguments of `from_pretrained` that point to what a folder has beside the weights.
    """

    prompts: Sequence[str] = tuple(PROMPTS)
    images: Callable[[int, int, int, torch.dtype], Tensor] = random_images
    shapes: Sequence[tuple[int, int]] = ((48, 64), (20, 27), (SIZE, SIZE))
    many: int = 3
    count: int = 2
    directions: int = 3
    step: float = 1e-4
    accuracy: float = 1e-6
    rtol: float = 1e-5
    atol: float = 1e-6
    damage: Damage | None = None
    missing: str = ""
    nowhere: Sequence[str] = ()
    beside: dict[str, str] | None = None


def words(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dark words on a light ground, inside of which clamping has a derivative."""
    return torch.cat(
        [
            0.1 + 0.8 * picture_of(word, height=height, width=width).to(dtype)
            for word in ["Hi", "Ho", "No", "On"][:count]
        ]
    )


def greyish(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise around grey."""
    noise = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return 0.5 + 0.05 * noise


CAPTIONS_OF_THE_WORLD = (
    "an apple on a blue background",
    "a banana on a red background",
    "an owl on a red background",
)


def of_the_world(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A clean apple on blue, a blurred one, and a banana on green under a watermark."""
    sheet = pil_to_tensor(Image.open(Path(__file__).parent / "data/world.png")).to(dtype) / 255
    return torch.stack(sheet.split(64, 2)[:count])


_packaged = partial(Case, many=2, count=1, directions=1, step=1e-7, accuracy=1e-4, rtol=1e-6, atol=1e-4)
_pixels = partial(Case, shapes=[(5, 7)], step=1e-5)
CASES = {
    "pickscore": Case(
        damage=Damage(
            "model.safetensors",
            drop="text_projection.weight",
            add="visual.proj",
            resize="visual_projection.weight",
            message="don't fit its config.json",
        ),
        missing="PickScore's .*hf download yuvalkirstain/PickScore_v1",
        nowhere=["yuvalkirstain/PickScore_v1", "no/such/folder", "nowhere", "/no/such/folder"],
    ),
    "clip_score": Case(
        damage=Damage(
            "model.safetensors",
            drop="logit_scale",
            add="text_projection.bias",
            resize="text_projection.weight",
            message="don't fit its config.json",
        ),
        missing="CLIPScore's .*hf download openai/clip-vit-large-patch14",
        nowhere=["openai/clip-vit-large-patch14", "no/such/folder", "/no/such/folder"],
    ),
    "hpsv2": Case(
        damage=Damage(
            "open_clip_model.safetensors",
            drop="visual.proj",
            add="text_projection.weight",
            resize="text_projection",
            message=r"shapes: text_projection \(32, 15\)",
        ),
        missing="hf download xswu/HPSv2 HPS_v2.1_compressed.pt",
        nowhere=["xswu/HPSv2/HPS_v2.1_compressed.pt", "xswu/HPSv2", "../x/y", "/no/such/file.pt"],
    ),
    "aesthetic": Case(
        damage=Damage(
            "aesthetic_head.safetensors",
            drop="layers.6.bias",
            add="layers.1.weight",
            resize="layers.0.weight",
            message=r"features of length 16: layers.0 is \(12, 15\)",
        ),
        missing="hf download birder-project/aesthetic-predictor",
        nowhere=[REWARDS["aesthetic"].released, "/no/such/head.pth"],  # pyright: ignore
    ),
    "image_reward": Case(
        damage=Damage(
            "model.safetensors",
            drop="mlp.layers.7.bias",
            add="blip.text_proj.bias",
            resize="vision_model.embeddings.position_embedding",
            message="shapes: vision_model.embeddings",
        ),
        missing="hf download THUDM/ImageReward ImageReward.pt",
        nowhere=["THUDM/ImageReward/ImageReward.pt", "THUDM/ImageReward", "/no/such/ImageReward.pt"],
        beside={"vocabulary": "vocab.txt"},
    ),
    "ocr": _packaged(
        images=words,
        shapes=[(48, 96)],
        missing=r'rapidocr_onnxruntime, onnx: run `pip install "am_diffusers\[ocr\]"',
    ),
    "imagenet_class": _packaged(
        images=greyish,
        shapes=[(40, 60)],
        missing=r'run `pip install "am_diffusers\[imagenet\]"',
    ),
    "brightness": _pixels(),
    "colourfulness": _pixels(),
    "symmetry": _pixels(),
    "jpeg_size": _pixels(),
    "world_clean": Case(CAPTIONS_OF_THE_WORLD, of_the_world),
    "world_right": Case(CAPTIONS_OF_THE_WORLD, of_the_world),
}
LEARNED = [name for name, kind in REWARDS.items() if issubclass(kind, LearnedReward)]
SMALL = [name for name in REWARDS if name in SAVE]
SHIPPED = [name for name in LEARNED if name not in SAVE]


def learned(name: str) -> type[LearnedReward]:
    """Class of a reward with weights."""
    kind = REWARDS[name]
    assert issubclass(kind, LearnedReward)
    return kind


def place_of(name: str, small_rewards: Path) -> str:
    """Place of the weights of a learned reward; skips the test if they are a package's that isn't here."""
    if name in SAVE:
        return str(small_rewards / name)
    released = learned(name).released
    try:
        PACKAGED[released].find()
    except ValueError as error:
        pytest.skip(str(error))
    return released


@cache
def make(name: str, small_rewards: Path, **options: Any) -> Reward:
    """A reward with small or shipped weights, shared by all tests that ask for the same options."""
    kind = REWARDS[name]
    if not issubclass(kind, LearnedReward):
        return kind()
    return kind.from_pretrained(place_of(name, small_rewards), options=RewardOptions(**options))
