"""The judge of the embedded world: is an image clean, and does it show what the prompt says?

Linear classifiers on features of EfficientNet-Lite0, a classifier of photographs, and on the colours of the
image's frame, trained on real images of the world, clean and spoilt (`scripts/assets/pretrain/judge.py`). It
has seen no generated image, and shares nothing with the small rewards: it judges what they train.

- `world_clean`: 1 if the image has no defect, else 0.
- `world_right`: 1 if object and background are those of the prompt, else 0. On a spoilt image the background
  may be beyond telling: among clean images its mean is the share of right ones.
"""

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from am_diffusers.rewards.base import FixedReward, check_images, check_prompts
from am_diffusers.rewards.imagenet_class import ImageNetClass, load_classifier, official_pixels, pooled
from am_diffusers.rewards.parts.packaged import EFFICIENTNET_LITE0
from am_diffusers.system.files import ASSETS, write_whole
from am_diffusers.system.text import suggest

FILE = ASSETS / "world/judge.safetensors"
BATCH = 32
FRAME = 14  # pixels of 224
CAPTION = re.compile(r"an? (?P<concept>.+) on an? (?P<background>.+) background")
CLEAN = "clean"


@dataclass(frozen=True)
class Heads:
    """Linear classifiers on standardised features.

    Attributes:
        mean: mean of the features, (D,).
        std: standard deviation of the features, (D,).
        weights: by name, `concept`, `background` and `condition`, a matrix (classes, D + 1), the last column
            the bias.
        names: names of the classes, by name of the classifier.
    """

    mean: Tensor
    std: Tensor
    weights: dict[str, Tensor]
    names: dict[str, list[str]]

    def logits(self, features: Tensor, head: str) -> Tensor:
        """Return the scores of the classes of one classifier, (B, classes)."""
        scaled = pad((features - self.mean) / self.std, (0, 1), value=1.0)
        return scaled @ self.weights[head].T

    def answers(self, features: Tensor, head: str) -> list[str]:
        """Return the most probable class of each image by name."""
        return [self.names[head][row] for row in self.logits(features, head).argmax(1).tolist()]

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        tensors = {"mean": self.mean, "std": self.std} | self.weights
        metadata = {"names": json.dumps(self.names)}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(file, lambda part: save_file(kept, part, metadata))

    @classmethod
    def load(cls, file: Path) -> "Heads":
        """Read what `save` wrote.

        Raises:
            ValueError: if it is another file.
        """
        try:
            with safe_open(file, "pt") as stored:
                names = json.loads(stored.metadata()["names"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return cls(tensors.pop("mean"), tensors.pop("std"), tensors, names)
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"{file} isn't the judge of the embedded world: {error}") from error


def judge_features(classifier: Any, pixels: Tensor) -> Tensor:
    """Return what the judge reads of images as the classifier reads them, (B, 1280 + 12).

    Features of the classifier, mean colours of the frame, and their products.
    """
    frame = pad(torch.zeros_like(pixels[:1, :1, FRAME:-FRAME, FRAME:-FRAME]), (FRAME,) * 4, value=1.0)
    colour = (pixels * frame).sum((2, 3)) / frame.sum()
    products = colour[:, :, None] * colour[:, None]
    return torch.cat([pooled(classifier, pixels), colour, products.flatten(1)], 1)


class WorldJudge(FixedReward):
    """Answers of the judge, for captions of the embedded world."""

    differentiable = False
    evaluates_only = True

    def __init__(self) -> None:
        self.heads = Heads.load(FILE)
        self._classifier = load_classifier(ImageNetClass.released).requires_grad_(False).eval()

    @classmethod
    def check_installed(cls) -> None:
        """Raise ValueError if the package with the classifier's weights is missing."""
        EFFICIENTNET_LITE0.find()

    def check_can_score(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that is no caption of the embedded world."""
        for prompt in dict.fromkeys(prompts):
            self._asked(prompt)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return 0 or 1 for each of `images` (B, 3, H, W) in [0, 1] and its prompt, (B,)."""
        check_images(images)
        check_prompts(prompts, len(images))
        answers = []
        for start in range(0, len(images), BATCH):
            pixels = official_pixels(images[start : start + BATCH].float())
            features = judge_features(self._classifier, pixels.to("cpu"))
            answers += self._answers(features, prompts[start : start + BATCH])
        return torch.tensor(answers, dtype=torch.float32, device=images.device)

    @abstractmethod
    def _answers(self, features: Tensor, prompts: Sequence[str]) -> list[bool]:
        """Return the answers for images with these features (B, D)."""

    def _asked(self, prompt: str) -> tuple[str, str]:
        """Return the object and the background that a caption names."""
        match = CAPTION.fullmatch(prompt)
        if match is None:
            raise ValueError(
                f"{self.name}: {prompt!r} is no caption of the embedded world, such as 'an apple on a blue "
                "background' (asset:prompts/eval.txt)"
            )
        for head, word in match.groupdict().items():
            if word not in self.heads.names[head]:
                raise ValueError(f"{self.name}: unknown {head} {suggest(word, self.heads.names[head])}")
        return match["concept"], match["background"]


class WorldClean(WorldJudge):
    """1 for an image without a visible defect, else 0."""

    name = "world_clean"

    def _answers(self, features: Tensor, prompts: Sequence[str]) -> list[bool]:
        return [answer == CLEAN for answer in self.heads.answers(features, "condition")]


class WorldRight(WorldJudge):
    """1 for an image of the object and the background that its prompt names, else 0."""

    name = "world_right"

    def _answers(self, features: Tensor, prompts: Sequence[str]) -> list[bool]:
        found = zip(*(self.heads.answers(features, head) for head in ("concept", "background")), strict=True)
        return [answer == self._asked(prompt) for answer, prompt in zip(found, prompts, strict=True)]
