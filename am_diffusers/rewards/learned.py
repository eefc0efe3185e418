"""Rewards that are frozen networks: passes in parts, features, work done once a prompt, skeletons."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from am_diffusers.rewards.base import DIFFERENTIABLE, Column, RewardOptions, check_images, check_prompts

logger = logging.getLogger(__name__)


class FrozenReward(ABC):
    """Reward that a frozen network computes, a part of the batch at a time.

    Args:
        network: frozen, set to evaluation and moved in place.
        options: settings of the reward.

    Attributes:
        network: the frozen network.
        options: settings of the reward.
        truncated_prompts: number of different prompts seen that were longer than the network reads.
    """

    name: str

    def __init__(self, network: nn.Module, *, options: RewardOptions) -> None:
        network.requires_grad_(False).eval().to(device=options.device, dtype=options.dtype)
        self.network = network
        self.options = options
        self.truncated_prompts = 0
        self._remembered: dict[str, Tensor] = {}

    @property
    def differentiable(self) -> bool:
        """True if scores have gradients with respect to the images: in every mode but "official"."""
        return self.options.mode != "official"

    @abstractmethod
    def _pixels(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as the network reads them, (B, 3, size, size)."""

    @abstractmethod
    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of prepared images."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of `images` (B, 3, H, W) in [0, 1] for their B `prompts`.

        Raises:
            ValueError: if images or prompts have the wrong shape or values.
        """
        check_images(images)
        check_prompts(prompts, len(images))
        return self._in_parts(self._score, images, prompts)

    def _in_parts(
        self, function: Callable[[Tensor, Sequence[str]], Tensor], images: Tensor, prompts: Sequence[str]
    ) -> Tensor:
        """Return `function(pixels, prompts)` of `batch_size` images at a time, checkpointed if asked."""

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

    def _once_a_prompt(self, prompts: Sequence[str], make: Callable[[str], Tensor]) -> list[Tensor]:
        """Return `make(prompt)` of each prompt without gradient, computed the first time a prompt is seen."""
        with torch.no_grad():
            for prompt in prompts:
                if prompt not in self._remembered:
                    # Alone: in a batch the last bits would depend on which prompts are remembered, and a
                    # resumed run would differ from one that was never stopped.
                    self._remembered[prompt] = make(prompt)
        return [self._remembered[prompt] for prompt in prompts]

    def _count_truncated(self, prompt: str, length: int, limit: int) -> None:
        """Count a prompt of which the network reads only `limit` tokens, and report the first one."""
        if length > limit:
            if not self.truncated_prompts:
                logger.warning(
                    "%s reads only the first %d tokens of prompts, e.g. %r", self.name, limit, prompt
                )
            self.truncated_prompts += 1


class Skeleton(FrozenReward):
    """Reward of full size without weights, for estimates of memory and time.

    The text tower of a CLIP-type reward runs once a prompt, without gradient, and is left out of a pass.

    Args:
        name: name of the reward.
        network: network of the reward, on the meta device.
        pixels: maps images in [0, 1] to what the network reads.
        score: maps prepared images to scores (B,).
        options: settings of the reward.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        pixels: Callable[[Tensor], Tensor],
        score: Callable[[Tensor], Tensor],
        options: RewardOptions,
    ) -> None:
        super().__init__(network, options=replace(options, device="meta"))
        self.name = name
        self._prepare, self._judge = pixels, score

    def materialise(self, device: torch.device | str) -> None:
        """Record that the network, whose weights were replaced, is on `device` and no longer on meta."""
        self.options = replace(self.options, device=device)

    def _pixels(self, images: Tensor) -> Tensor:
        return self._prepare(images)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._judge(pixels)


class LearnedReward(FrozenReward):
    """Reward with trained weights: how they are loaded, converted, left out and printed.

    Attributes:
        released: file or hub id of the published weights, or `package:NAME` of a package that ships them.
        column: column of the reward in papers; None = it has none.
    """

    released: ClassVar[str]
    column: ClassVar[Column | None] = None

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
            path: place of the weights.
            revision: commit of a hub model.
            sha256: digest of a weight file, checked before the file is read; None = the pinned one, if any.
            options: settings of the reward.

        Raises:
            ValueError: if something is missing (with the command that downloads it) or doesn't fit.
        """

    @classmethod
    def convert(cls, path: str | Path, folder: Path, sha256: str | None) -> None:
        """Write a published pickle as a folder that `from_pretrained` reads.

        Args:
            path: the file, or its place on the hub.
            folder: folder to write; other files in it stay.
            sha256: digest of the file; None = the pinned one, if any.

        Raises:
            ValueError: if the weights need no conversion, or the file is missing or another.
        """
        raise ValueError(f"{cls.name} needs no conversion: set `model: {cls.released}` of this reward")

    @classmethod
    def skeleton(cls, path: str, *, revision: str | None, options: RewardOptions) -> Skeleton:
        """Return the reward without its weights; by default they are loaded and dropped: for a few megabytes.

        Args:
            path: folder, file or hub id of the weights, beside which the sizes are read if they are there.
            revision: commit of a hub id.
            options: settings of the reward.

        Raises:
            ValueError: if the sizes are unknown, or a package isn't installed.
        """
        loaded = cls.from_pretrained(path, revision=revision, options=replace(options, device="cpu"))
        network = loaded.network

        def score(pixels: Tensor) -> Tensor:
            return network(pixels).float().flatten(1).mean(1)

        return Skeleton(cls.name, network, pixels=loaded._pixels, score=score, options=options)

    def check_can_score(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that the reward can't score, before a run starts."""


class FeatureReward(LearnedReward):
    """Learned reward whose vision tower makes one feature vector of an image."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return image features before normalisation, (B, D)."""

    def image_features(self, images: Tensor) -> Tensor:
        """Return features (B, D) of length 1 of `images` (B, 3, H, W) in [0, 1]."""
        check_images(images)
        return self._in_parts(lambda pixels, _: self._features(pixels), images, [""] * len(images))

    def _features(self, pixels: Tensor) -> Tensor:
        return unit_length(self._encode_pixels(pixels))


def unit_length(features: Tensor) -> Tensor:
    """Return features (B, D) divided by their norm, in float32 or better."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
