"""Rewards without weights, formulas of the pixels: brightness, colourfulness, symmetry, JPEG size."""

import io
from abc import abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from am_diffusers.rewards.base import FixedReward, check_images, check_prompts
from am_diffusers.rewards.parts.preprocess import to_pil

EPSILON = 1e-12


class PixelReward(FixedReward):
    """Formula of the pixels; the prompts don't matter."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of `images` (B, 3, H, W) in [0, 1]; the prompts are only checked."""
        check_images(images)
        check_prompts(prompts, len(images))
        return self._score(images)

    @abstractmethod
    def _score(self, images: Tensor) -> Tensor:
        """Return scores (B,) of checked images."""


class Brightness(PixelReward):
    """Mean of all pixels and channels, in [0, 1], for tests and first steps; the optimum is a white image."""

    name = "brightness"

    def _score(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(1)


class Colourfulness(PixelReward):
    """Spread and strength of the opponent colours rg = R - G and yb = (R + G) / 2 - B.

    sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2), in [0, 1.6]: 0 for a grey image. The metric as
    published (Hasler and Suesstrunk 2003) is 255 times this, for 8-bit values.
    """

    name = "colourfulness"

    def _score(self, images: Tensor) -> Tensor:
        red, green, blue = images.flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
        variance, mean = torch.var_mean(opponents, dim=2, correction=0)
        # EPSILON: the square root of a grey image's 0 has no gradient.
        return (variance.sum(1) + EPSILON).sqrt() + 0.3 * (mean.square().sum(1) + EPSILON).sqrt()


class Symmetry(PixelReward):
    """Minus the mean squared difference from the left-right mirrored image, in [-1, 0].

    Every symmetric image is an optimum, no single pixel decides: images should stay diverse under it.
    """

    name = "symmetry"

    def _score(self, images: Tensor) -> Tensor:
        return -(images - images.flip(-1)).square().flatten(1).mean(1)


class JpegSize(PixelReward):
    """Bytes of the image as a JPEG of quality 95 (Black et al. 2023, DDPO, arXiv 2305.13301).

    It has no gradients: gradient methods must refuse it.
    """

    name = "jpeg_size"
    differentiable = False

    def _score(self, images: Tensor) -> Tensor:
        return images.new_tensor([_jpeg_bytes(image) for image in to_pil(images)])


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
