"""Preparation of images in [0, 1] for PP-OCR's recogniser: a text line, blue first, 48 rows, in [-1, 1].

The whole image is one line of text. The published path (rapidocr_onnxruntime's `resize_norm_img`) squeezes
it to 48 rows with OpenCV's bilinear resize, keeps the aspect ratio and fills up with grey to 320 columns.
That resize isn't antialiased: of an image much taller than 48 pixels only the two rows (and columns) next to
each sampling point are read, and only they get gradients.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from am_diffusers.rewards.parts.preprocess import round_to_8_bit

HEIGHT, MIN_WIDTH = 48, 320
COEFFICIENT_BITS = 11  # of OpenCV's fixed-point weights


def line_width(height: int, width: int) -> int:
    """Return the columns of a resized image: 48 width / height, rounded up unless above 320."""
    widest = int(HEIGHT * max(MIN_WIDTH / HEIGHT, width / height))
    return min(math.ceil(HEIGHT * (width / height)), widest)


def text_line(images: Tensor, *, rounded: bool = False) -> Tensor:
    """Resize, turn RGB to BGR, normalise and pad, differentiably.

    Against the published path only its roundings are missing, less than 0.8 of an 8-bit level.

    Args:
        images: (B, 3, H, W) in [0, 1].
        rounded: round to 1/255 before and after resizing, with straight-through gradients.

    Returns:
        (B, 3, 48, max(320, 48 W / H)) in [-1, 1].
    """
    size = (HEIGHT, line_width(*images.shape[-2:]))
    source = round_to_8_bit(images) if rounded else images
    resized = interpolate(source, size, mode="bilinear", align_corners=False, antialias=False)
    return _normalise(round_to_8_bit(resized) if rounded else resized)


def official_text_line(images: Tensor) -> Tensor:
    """Prepare images as rapidocr_onnxruntime does, bit for bit: 8-bit pixels, fixed-point resize.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, 48, max(320, 48 W / H)) in [-1, 1], float32, without gradients.
    """
    levels = (images.detach().float() * 255).round().long()
    resized = _resize_like_opencv(levels, HEIGHT, line_width(*images.shape[-2:]))
    return _normalise(resized.float() / 255)


def _normalise(line: Tensor) -> Tensor:
    """Normalise (B, 3, 48, W) in [0, 1] and fill up the columns; padding is 0 after normalising: mid-grey."""
    return pad((line.flip(1) - 0.5) / 0.5, (0, max(0, MIN_WIDTH - line.shape[-1])))


class _Taps(NamedTuple):
    """Two source positions of each target position and their weights times 2^11; all (size,) int64."""

    first: Tensor
    second: Tensor
    first_weight: Tensor
    second_weight: Tensor


def _resize_like_opencv(levels: Tensor, height: int, width: int) -> Tensor:
    """Resize 8-bit images (B, C, H, W), int64, as `cv2.resize` with INTER_LINEAR does."""
    if tuple(levels.shape[-2:]) == (2 * height, 2 * width):  # OpenCV then averages 2 x 2 pixels
        blocks = levels.unflatten(-2, (height, 2)).unflatten(-1, (width, 2))
        return (blocks.sum((-3, -1)) + 2) >> 2
    columns = _taps(levels.shape[-1], width, levels.device)
    rows = _taps(levels.shape[-2], height, levels.device)
    # Columns outside the image get no weight; rows outside are read from the edge, with their weight.
    inside = (columns.first >= 0) & (columns.first < levels.shape[-1] - 1)
    left = columns.first_weight.where(inside, 2**COEFFICIENT_BITS)
    right = columns.second_weight.where(inside, 0)
    last_column, last_row = levels.shape[-1] - 1, levels.shape[-2] - 1
    across = levels[..., columns.first.clamp(0, last_column)] * left
    across = (across + levels[..., columns.second.clamp(0, last_column)] * right) >> 4
    above = across[..., rows.first.clamp(0, last_row), :] * rows.first_weight[:, None]
    below = across[..., rows.second.clamp(0, last_row), :] * rows.second_weight[:, None]
    return ((above >> 16) + (below >> 16) + 2) >> 2


def _taps(source: int, target: int, device: torch.device) -> _Taps:
    # In doubles, then single precision: where OpenCV rounds.
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    position = centres.float().to(device)
    first = position.floor()
    fraction = position - first
    scale = 2**COEFFICIENT_BITS
    weights = ((1 - fraction) * scale).round().long(), (fraction * scale).round().long()
    return _Taps(first.long(), first.long() + 1, *weights)
