"""Image files of any origin, read as they are seen: upright, on white, in the range of their mode."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

RANGES = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I": 65535, "F": 1}
"""Value of white by mode, of those that aren't 8-bit: Pillow keeps 16-bit files of some formats in `I`."""
COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
"""Modes that Pillow converts to RGB."""


def read_image(file: Path) -> Tensor:
    """Read an image file as RGB (3, H, W) in [0, 1].

    Transparency is laid on white, and an EXIF orientation followed. Colour profiles are not.

    Raises:
        ValueError: if it can't be read, or its mode or values have no known range.
    """
    with _opened(file) as image:
        image.load()
        pixels = _seen(ImageOps.exif_transpose(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def check_image(file: Path) -> None:
    """Look at the beginning of an image file.

    Raises:
        ValueError: if `read_image` wouldn't read its format or its mode.
    """
    with _opened(file):
        pass


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            if image.mode not in (*RANGES, *COLOURS):
                raise ValueError(f"its mode is {image.mode}: save it as RGB")
            if image.mode in RANGES and image.has_transparency_data:
                raise ValueError(f"its mode is {image.mode} with transparency: save it as RGB")
            yield image
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no image that can be read: {error}") from error


def _seen(image: Image.Image) -> np.ndarray:
    """Return pixels (H, W, 3) in [0, 1], float32."""
    if image.mode in RANGES:
        white = RANGES[image.mode]
        grey = np.asarray(image, np.float32) / white
        if not np.all((grey >= 0) & (grey <= 1)):  # also where one isn't finite
            raise ValueError(f"its mode is {image.mode} with values outside [0, {white}]: save it as RGB")
        return np.repeat(grey[:, :, None], 3, axis=2)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"), np.float32) / 255
    pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
    colour, alpha = pixels[:, :, :3], pixels[:, :, 3:]
    return colour * alpha + (1 - alpha)
