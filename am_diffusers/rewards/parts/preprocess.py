"""Preparation of images in [0, 1] for a CLIP vision tower: bicubic resize, crop or pad, normalise.

Everything but `to_pil` and `pil_crop` acts on tensors (B, 3, H, W) and is differentiable. Resizing is
antialiased, as PIL's is; without it features move twenty times as far from the official ones (cosine distance
2.3e-2, not 1.0e-3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from am_diffusers.rewards.base import Mode

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PixelFormat:
    """Input of a vision tower: square images of `size` pixels, normalised per channel.

    Attributes:
        size: edge of the square input in pixels.
        mean: mean subtracted per channel, in units of [0, 1].
        std: standard deviation divided by per channel, in units of [0, 1].
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def normalise(self, images: Tensor) -> Tensor:
        """Return `(images - mean) / std` per channel, (B, 3, H, W)."""
        mean = images.new_tensor(self.mean).view(3, 1, 1)
        std = images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean) / std

    def crop(self, images: Tensor, *, rounded: bool = False) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] after `shortest_edge_crop`, normalised."""
        return self.normalise(shortest_edge_crop(images, self.size, rounded=rounded))


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resize to (B, 3, height, width), antialiased; overshoots beyond [0, 1] are kept."""
    return interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def half_down(margin: int) -> int:
    """Return the pixels that transformers crops on the left of an odd margin: the smaller half."""
    return margin // 2


def half_to_even(margin: int) -> int:
    """Return the pixels that torchvision crops on the left of an odd margin: the even half."""
    return round(margin / 2)


def shortest_edge_crop(
    images: Tensor, size: int, *, rounded: bool = False, half: Callable[[int], int] = half_down
) -> Tensor:
    """Resize the shortest edge to `size` and crop the centre, as is done with PIL.

    PIL resizes along rows first, then along columns, and stores 8 bits after each pass: overshoot is clipped
    twice. (Pillow 13 swaps the passes when it shrinks images more than twice as tall as wide; the published
    scores are older.)

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: edge of the result in pixels.
        rounded: round to 1/255 where PIL does, before and after each pass, with straight-through gradients.
        half: pixels cropped on the left and top of a margin, `half_down` or `half_to_even`.

    Returns:
        (B, 3, size, size) in [0, 1].
    """
    height, width = images.shape[-2:]
    new_height, new_width = _shortest_edge(height, width, size)
    quantise = round_to_8_bit if rounded else _identity
    rows = quantise(bicubic(quantise(images), height, new_width).clamp(0, 1))
    resized = quantise(bicubic(rows, new_height, new_width).clamp(0, 1))
    top, left = half(new_height - size), half(new_width - size)
    return resized[..., top : top + size, left : left + size]


def clip_package_crop(images: Tensor, size: int, mode: Mode) -> Tensor:
    """Resize the shortest edge to `size` and crop the centre as the CLIP package does; many rewards use it.

    That transform is torchvision's on PIL images, which crops some odd margins differently from transformers.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: edge of the result in pixels.
        mode: "official" goes through PIL and has no gradient; see `RewardOptions`.

    Returns:
        (B, 3, size, size) in [0, 1].
    """
    if mode != "official":
        return shortest_edge_crop(images, size, rounded=mode == "rounded", half=half_to_even)
    return pil_crop(images, size, half_to_even)


def pil_crop(images: Tensor, size: int, half: Callable[[int], int]) -> Tensor:
    """Resize and crop as in `shortest_edge_crop`, with PIL and without gradient."""
    height, width = _shortest_edge(images.shape[-2], images.shape[-1], size)
    top, left = half(height - size), half(width - size)
    resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in to_pil(images)]
    cropped = [np.asarray(image)[top : top + size, left : left + size] for image in resized]
    return torch.from_numpy(np.stack(cropped)).permute(0, 3, 1, 2).float() / 255


def _shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width after resizing the shortest edge to `size`; the other is rounded down."""
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def longest_edge_pad(images: Tensor, size: int, *, rounded: bool = False) -> Tensor:
    """Resize the longest edge to `size` and pad with black to a square, as the hpsv2 package does.

    Its transform resizes float tensors, so nothing clips the overshoot of the bicubic kernel there or here.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: edge of the result in pixels.
        rounded: round to 1/255 before resizing, as image files are, with straight-through gradients.

    Returns:
        (B, 3, size, size).
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    source = round_to_8_bit(images) if rounded else images
    resized = bicubic(source, max(1, round(height * scale)), max(1, round(width * scale)))
    pad_height, pad_width = size - resized.shape[-2], size - resized.shape[-1]
    left, top = pad_width // 2, pad_height // 2
    return pad(resized, (left, pad_width - left, top, pad_height - top))


def round_to_8_bit(images: Tensor) -> Tensor:
    """Round to multiples of 1/255, with the gradient of the identity (straight-through)."""
    return images + ((images * 255).round() / 255 - images).detach()


def _identity(images: Tensor) -> Tensor:
    return images


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return (B, 3, H, W) in [0, 1] as B 8-bit RGB images, rounded as Diffusers' `numpy_to_pil` does."""
    arrays = (images.detach().float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
