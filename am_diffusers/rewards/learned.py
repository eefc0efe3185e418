"""What all rewards with weights share: options, frozen models, passes in parts, features, long prompts."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from am_diffusers.rewards.base import check_images, check_prompts

logger = logging.getLogger(__name__)

Mode = Literal["differentiable", "rounded", "official"]


@dataclass(frozen=True)
class RewardOptions:
    """How a reward with weights runs.

    Attributes:
        mode: how pictures are prepared. "differentiable" keeps everything in float tensors; "rounded" adds
            the 8-bit roundings of the published scorer with straight-through gradients; "official" is the
            published path itself and has no gradients.
        device: where the model runs; inputs are moved there and scores stay there.
        dtype: of the towers; scores are computed from their features in float32 or better.
        batch_size: pictures per pass of the vision tower; None: all.
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


DIFFERENTIABLE, OFFICIAL = RewardOptions(), RewardOptions("official")


class LearnedReward(ABC):
    """A reward whose weights are frozen, scored a part of the batch at a time.

    Args:
        model: frozen, set to evaluation and moved in place.
        options: how it runs.

    Attributes:
        released: file or hub id of the published weights, or `package:NAME` of a package that ships them.
        options: how it runs.
        truncated_prompts: number of different prompts seen that were longer than the model reads.
    """

    name: ClassVar[str]
    released: ClassVar[str]

    def __init__(self, model: nn.Module, *, options: RewardOptions) -> None:
        model.requires_grad_(False).eval().to(device=options.device, dtype=options.dtype)
        self.options = options
        self.truncated_prompts = 0
        self._model = model

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions = DIFFERENTIABLE,
    ) -> "LearnedReward":
        """Load the weights at `path`: a folder, a file or a place on the hub.

        Args:
            path: where the weights are.
            revision: commit of a hub model.
            sha256: of a weight file, checked before it is read; None = the pinned one, if there is one.
            options: how it runs.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or doesn't fit.
        """

    @property
    def differentiable(self) -> bool:
        """Whether scores have gradients with respect to the images: in every mode but "official"."""
        return self.options.mode != "official"

    def check_can_score(self, prompts: Sequence[str]) -> None:  # noqa: B027 - most rewards take any prompt
        """Raise ValueError for a prompt that this reward can't score, before a run starts; most can all."""

    @abstractmethod
    def _pixels(self, images: Tensor) -> Tensor:
        """Images in [0, 1] prepared for the vision tower, (B, 3, size, size)."""

    @abstractmethod
    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of prepared pictures."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of `images` (B, 3, H, W) in [0, 1] for their B `prompts`.

        Raises:
            ValueError: if images or prompts have the wrong shape or values.
        """
        check_images(images)
        check_prompts(prompts, len(images))
        return self._in_parts(self._score, images, prompts)

    def _in_parts(
        self, function: Callable[[Tensor, Sequence[str]], Tensor], images: Tensor, prompts: Sequence[str]
    ) -> Tensor:
        """`function(pixels, prompts)` of `batch_size` pictures at a time, checkpointed if asked."""

        def part(images: Tensor, prompts: Sequence[str]) -> Tensor:
            images = images.to(self.options.device, torch.promote_types(images.dtype, torch.float32))
            pixels = self._pixels(images).to(self.options.device, self.options.dtype)
            return function(pixels, prompts)

        size = self.options.batch_size or len(images)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            recompute = self.options.checkpointing and torch.is_grad_enabled()
            parts = []
            for start in range(0, len(images), size):
                arguments = images[start : start + size], prompts[start : start + size]
                parts.append(
                    checkpoint(part, *arguments, use_reentrant=False) if recompute else part(*arguments)
                )
            return torch.cat(parts)

    def _count_truncated(self, prompts: Sequence[str], lengths: Sequence[int], limit: int) -> None:
        """Count and, the first time, report the prompts of which the model reads only `limit` tokens."""
        cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
        if cut and not self.truncated_prompts:
            logger.warning("%s reads only the first %d tokens of prompts, e.g. %r", self.name, limit, cut[0])
        self.truncated_prompts += len(cut)


class FeatureReward(LearnedReward):
    """A learned reward whose vision tower makes one feature vector of a picture."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Image features before normalisation, (B, D)."""

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, D) of length 1 of `images` (B, 3, H, W) in [0, 1]."""
        check_images(images)
        return self._in_parts(lambda pixels, _: self._features(pixels), images, [""] * len(images))

    def _features(self, pixels: Tensor) -> Tensor:
        return unit_length(self._encode_pixels(pixels))


def unit_length(features: Tensor) -> Tensor:
    """Features (B, D) divided by their norm, in float32 or better."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
