"""The common part of CLIP-type rewards: `scale * cos(image features, text features)`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from am_diffusers.rewards.base import check_images, check_prompts

logger = logging.getLogger(__name__)

Mode = Literal["differentiable", "rounded", "official"]


@dataclass(frozen=True)
class ClipOptions:
    """How a CLIP-type reward runs.

    Attributes:
        mode: how pictures are prepared. "differentiable" keeps everything in float tensors; "rounded" adds
            the 8-bit roundings of the published scorer with straight-through gradients; "official" is the
            published path itself and has no gradients.
        device: where the model runs; inputs are moved there and scores stay there.
        dtype: of the towers; features are compared in float32 or better.
        batch_size: pictures per pass of the vision tower, prompts per pass of the text tower; None: all.
        checkpointing: recompute each pass of the vision tower in backward, so that only the activations of
            one pass (`batch_size` pictures) are held at a time.

    Raises:
        ValueError: if `mode` is unknown or `batch_size` not positive.
    """

    mode: Mode = "differentiable"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"expected mode to be one of {get_args(Mode)}, got {self.mode!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"expected a reward batch_size of at least 1 or none, got {self.batch_size}")


class ClipReward(ABC):
    """A reward that compares the image and text features of a frozen two-tower model.

    Text features are computed once per prompt, without gradients.

    Args:
        model: both towers; frozen, set to evaluation and moved in place.
        scale: what the cosine is multiplied with.
        options: how it runs.

    Attributes:
        scale: what the cosine is multiplied with.
        options: how it runs.
        truncated_prompts: number of different prompts seen that were longer than the text tower reads.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, *, scale: float, options: ClipOptions) -> None:
        model.requires_grad_(False).eval().to(device=options.device, dtype=options.dtype)
        self.scale = scale
        self.options = options
        self.truncated_prompts = 0
        self._text_cache: dict[str, Tensor] = {}

    @property
    def differentiable(self) -> bool:
        """Whether scores have gradients with respect to the images: in every mode but "official"."""
        return self.options.mode != "official"

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens the text tower reads, begin and end marks included."""

    @abstractmethod
    def _pixels(self, images: Tensor) -> Tensor:
        """Images in [0, 1] prepared for the vision tower, (B, 3, size, size)."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Image features before normalisation, (B, D)."""

    @abstractmethod
    def _num_tokens(self, prompt: str) -> int:
        """Tokens of `prompt` before truncation, begin and end marks included."""

    @abstractmethod
    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text features before normalisation, (B, D); prompts truncated as the official scorer does."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of `images` (B, 3, H, W) in [0, 1] for their B `prompts`.

        Raises:
            ValueError: if images or prompts have the wrong shape or values.
        """
        check_images(images)
        check_prompts(prompts, len(images))
        return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, D) of length 1 of `images` (B, 3, H, W) in [0, 1]."""
        check_images(images)
        chunks = images.split(self.options.batch_size or len(images))
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            if self.options.checkpointing and torch.is_grad_enabled():
                features = [checkpoint(self._image_features, chunk, use_reentrant=False) for chunk in chunks]
            else:
                features = [self._image_features(chunk) for chunk in chunks]
            return torch.cat(features)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of length 1 of the prompts, without gradients, remembered per prompt."""
        check_prompts(prompts, len(prompts))
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        size = self.options.batch_size or max(1, len(new))
        with torch.no_grad():
            for start in range(0, len(new), size):
                chunk = new[start : start + size]
                self._text_cache.update(zip(chunk, _normalise(self._encode_prompts(chunk)), strict=True))
        self._count_truncated(new)
        return torch.stack([self._text_cache[prompt] for prompt in prompts])

    def _image_features(self, images: Tensor) -> Tensor:
        images = images.to(self.options.device, torch.promote_types(images.dtype, torch.float32))
        pixels = self._pixels(images).to(self.options.device, self.options.dtype)
        return _normalise(self._encode_pixels(pixels))

    def _count_truncated(self, prompts: Sequence[str]) -> None:
        limit = self.context_length
        cut = [prompt for prompt in prompts if self._num_tokens(prompt) > limit]
        if cut and not self.truncated_prompts:
            logger.warning("%s reads only the first %d tokens of prompts, e.g. %r", self.name, limit, cut[0])
        self.truncated_prompts += len(cut)


def _normalise(features: Tensor) -> Tensor:
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def check_keys(source: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ValueError naming the first keys by which a checkpoint differs from its model."""
    differences = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    parts = [f"{len(keys)} {kind}, e.g. {', '.join(keys[:3])}" for kind, keys in differences.items() if keys]
    if parts:
        raise ValueError(f"the weights in {source} aren't this reward's: keys {'; '.join(parts)}")
