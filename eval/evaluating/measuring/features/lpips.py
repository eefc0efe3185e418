"""LPIPS: how much an image changed, by distances of AlexNet's activations (arXiv 1801.03924)."""

from typing import Any

import torch
from torch import Tensor, nn

from am_diffusers.rewards.base import check_images
from am_diffusers.rewards.parts.packaged import load_module

NAME = "lpips"


class LPIPS:
    """Distance of pairs of images, at least 0. Build it with `from_pretrained`.

    Args:
        model: the package's network; frozen, set to evaluation and moved in place.
        device: device it runs on.
    """

    name = NAME

    def __init__(self, model: nn.Module, *, device: torch.device | str = "cpu") -> None:
        self._model: Any = model.requires_grad_(False).eval().to(device)
        self._device = device

    @classmethod
    def from_pretrained(cls, *, device: torch.device | str = "cpu") -> "LPIPS":
        """Load version 0.1 on AlexNet, the package's default, which torchvision downloads once (233 MB).

        Raises:
            ValueError: if the package or AlexNet's weights are missing (with the command that gets them).
        """
        package = load_module(NAME, 'run `pip install "am_diffusers[perceptual]"`')
        try:
            return cls(package.LPIPS(net="alex", verbose=False), device=device)
        except OSError as error:  # no network, too
            command = "from torchvision.models import alexnet; alexnet(weights='DEFAULT')"
            raise ValueError(
                f'AlexNet\'s weights not found ({error}): run `python -c "{command}"`'
            ) from error

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return distances (B,) of `first` and `second`, both (B, 3, H, W) in [0, 1], float32 on the CPU.

        Raises:
            ValueError: if they have different shapes, or the wrong shape or values.
        """
        check_images(first)
        check_images(second)
        if first.shape != second.shape:
            raise ValueError(f"expected pairs of images, got {tuple(first.shape)} and {tuple(second.shape)}")
        pair = (images.to(self._device, torch.float32) for images in (first, second))
        return self._model(*pair, normalize=True).flatten().cpu()
