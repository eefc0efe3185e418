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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from am_diffusers.rewards.base import DIFFERENTIABLE, RewardOptions
from am_diffusers.rewards.imagenet_class import ImageNetClass, load_classifier, official_pixels, pooled
from am_diffusers.rewards.learned import LearnedReward
from am_diffusers.rewards.parts.files import find_file
from am_diffusers.system.text import suggest

FRAME = 14  # pixels of 224
CAPTION = re.compile(r"an? (?P<concept>.+) on an? (?P<background>.+) background")
CLEAN = "clean"
T = TypeVar("T", bound="WorldJudge")


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
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)

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
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{file} isn't the judge of the embedded world: {error}") from error


def judge_features(classifier: Any, pixels: Tensor) -> Tensor:
    """Return what the judge reads of images as the classifier reads them, (B, 1280 + 12).

    Features of the classifier, mean colours of the frame, and their products.
    """
    frame = pad(torch.zeros_like(pixels[:1, :1, FRAME:-FRAME, FRAME:-FRAME]), (FRAME,) * 4, value=1.0)
    colour = (pixels * frame).sum((2, 3)) / frame.sum()
    products = colour[:, :, None] * colour[:, None]
    return torch.cat([pooled(classifier, pixels), colour, products.flatten(1)], 1)


class WorldJudge(LearnedReward):
    """Answers of the judge. Build one of its two rewards with `from_pretrained`.

    Args:
        classifier: timm's EfficientNet-Lite0.
        heads: the trained classifiers.
        options: settings of the reward; images are always read as the judge was trained to.
    """

    released = "asset:world/judge.safetensors"
    evaluates_only = True

    @property
    def differentiable(self) -> bool:
        """Return False: answers have no gradient."""
        return False

    def __init__(
        self, classifier: nn.Module, heads: Heads, *, options: RewardOptions = DIFFERENTIABLE
    ) -> None:
        super().__init__(classifier, options=options)
        self.heads = Heads(
            heads.mean.to(options.device),
            heads.std.to(options.device),
            {name: each.to(options.device) for name, each in heads.weights.items()},
            heads.names,
        )

    @classmethod
    def from_pretrained(
        cls: type[T],
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> T:
        """Load the judge's file, and the classifier of the installed package, see `LearnedReward`."""
        file = find_file(path, revision, f"use {cls.released}")
        return cls(load_classifier(ImageNetClass.released), Heads.load(file), options=options)

    def check_can_score(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that is no caption of the embedded world."""
        for prompt in dict.fromkeys(prompts):
            self._asked(prompt)

    def _pixels(self, images: Tensor) -> Tensor:
        return official_pixels(images)

    def _asked(self, prompt: str) -> dict[str, str]:
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
        return match.groupdict()


class WorldClean(WorldJudge):
    """1 for an image without a visible defect, else 0."""

    name = "world_clean"

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        answers = self.heads.answers(judge_features(self.network, pixels).float(), "condition")
        return pixels.new_tensor([answer == CLEAN for answer in answers])


class WorldRight(WorldJudge):
    """1 for an image of the object and the background that its prompt names, else 0."""

    name = "world_right"

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        features = judge_features(self.network, pixels).float()
        found = zip(*(self.heads.answers(features, head) for head in ("concept", "background")), strict=True)
        asked = [tuple(self._asked(prompt).values()) for prompt in prompts]
        return pixels.new_tensor([answer == wanted for answer, wanted in zip(found, asked, strict=True)])
