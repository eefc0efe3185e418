"""Features of images: frozen networks that say how different images look, a batch at a time."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from am_diffusers.rewards.base import check_images


class Features(ABC):
    """Features of images as published: the preprocessing on 8-bit images, the network's own scale.

    Without gradients. The angle between features is a distance of images; Frechet distances are of features
    as they are.

    Args:
        model: frozen, set to evaluation and moved in place.
        device: where the model runs.
        batch_size: images per pass; None = all at once.

    Attributes:
        released: hub id of the published weights, or `package:NAME` of a package that has them.
    """

    name: ClassVar[str]
    released: ClassVar[str]

    def __init__(
        self, model: nn.Module, *, device: torch.device | str = "cpu", batch_size: int | None = None
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"expected a features batch_size of at least 1 or none, got {batch_size}")
        model.requires_grad_(False).eval().to(device)
        self._device = device
        self._batch_size = batch_size

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> "Features":
        """Load the weights at `path`.

        Args:
            path: where the weights are; `released` by default.
            revision: commit of a hub id.
            device: where the model runs.
            batch_size: images per pass; None = all at once.

        Raises:
            ValueError: if something is missing (with the command that gets it) or doesn't fit.
        """

    def image_features(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of `images` (B, 3, H, W) in [0, 1], float32 on the CPU.

        Raises:
            ValueError: if images have the wrong shape or values.
        """
        check_images(images)
        parts = images.split(self._batch_size or len(images))
        return torch.cat([self._encode(self._pixels(part).to(self._device)).float().cpu() for part in parts])

    @abstractmethod
    def _pixels(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as the network reads them, (B, 3, size, size)."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the features (B, D) of prepared images."""
