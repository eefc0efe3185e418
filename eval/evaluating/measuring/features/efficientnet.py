"""EfficientNet-Lite0: what its classifier reads of an image; the weights come with a package, no download.

The network of the reward imagenet_class, where its sources are.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from am_diffusers.rewards.imagenet_class import ImageNetClass, load_classifier, official_pixels, pooled
from evaluating.measuring.features.base import Features


class EfficientNet(Features):
    """Pooled features, (B, 1280), all at least 0. Build it with `from_pretrained`.

    Args:
        model: timm's classifier.
        device: where the model runs.
        batch_size: images per pass; None = all at once.
    """

    name = "efficientnet"
    released = ImageNetClass.released

    def __init__(
        self, model: nn.Module, *, device: torch.device | str = "cpu", batch_size: int | None = None
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size)
        self._model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = released,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> "EfficientNet":
        """Load the weights of the installed package, or a file in the same layout, see `Features`."""
        return cls(load_classifier(path, revision=revision), device=device, batch_size=batch_size)

    def _pixels(self, images: Tensor) -> Tensor:
        return official_pixels(images)

    def _encode(self, pixels: Tensor) -> Tensor:
        return pooled(self._model, pixels)
