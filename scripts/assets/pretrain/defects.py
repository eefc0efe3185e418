"""What spoils images found on the web: one visible defect each, on images (B, 3, 64, 64) in [0, 1].

`cut_off` is made where the object is placed, see `world.py`; all others here.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

Defect = Callable[[Tensor, torch.Generator], Tensor]
BLOCK = 8
CASTS = ((0.4, 1.25, 0.5), (0.3, 0.85, 1.5), (1.35, 0.4, 1.15))
WATERMARK = "STOCK"


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a Gaussian of 2.2 to 3 pixels."""
    sharpness = torch.rand(len(images), 1, 1, 1, generator=generator)
    weak, strong = gaussian_blur(images, 11, 2.0), gaussian_blur(images, 15, 3.2)
    return sharpness * weak + (1 - sharpness) * strong


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add grains of two pixels, of standard deviation .12 to .18."""
    size = images.shape[-1] // 2
    grains = torch.randn(len(images), 1, size, size, generator=generator)
    strength = 0.12 + 0.06 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + strength * F.interpolate(grains, scale_factor=2, mode="nearest")


def compressed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Keep the mean, in seven levels, and a trace of the two slowest waves of each 8 x 8 block."""
    number, channels, size, _ = images.shape
    count = size // BLOCK
    blocks = images.reshape(number, channels, count, BLOCK, count, BLOCK).permute(0, 1, 2, 4, 3, 5)
    wave = torch.cos(torch.pi * (torch.arange(BLOCK) + 0.5) / BLOCK)
    waves = torch.stack([wave[:, None].expand(BLOCK, BLOCK), wave[None].expand(BLOCK, BLOCK)])
    mean = (blocks.mean((-1, -2)) * 7).round() / 7
    heights = torch.einsum("bcijxy,kxy->bcijk", blocks, waves) / waves[0].square().sum()
    heights = (heights * 6).round() / 6
    kept = mean[..., None, None] + torch.einsum("bcijk,kxy->bcijxy", heights, waves)
    return kept.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


def washed_out(images: Tensor, generator: torch.Generator) -> Tensor:
    """Leave a quarter to a third of the contrast, around a light gray."""
    contrast = 0.24 + 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return contrast * images + (1 - contrast) * 0.78


def tinted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn four fifths of the colour into shades of a single one of `CASTS`."""
    casts = torch.tensor(CASTS)[torch.randint(len(CASTS), (len(images),), generator=generator)]
    gray = images.mean(1, keepdim=True)
    return 0.2 * images + 0.8 * (0.1 + 0.9 * gray) * casts[:, :, None, None]


@cache
def watermark(size: int) -> Tensor:
    """Draw the opacity (1, size, size) of a word and lines across the image."""
    scale = 4
    canvas = Image.new("L", (2 * scale * size, 2 * scale * size))
    draw = ImageDraw.Draw(canvas)
    middle = scale * size
    font = ImageFont.load_default(21 * scale)
    draw.text((middle, middle), WATERMARK, 255, font, "mm", stroke_width=2, stroke_fill=255)
    for away in (-22, 22):
        height = middle + away * scale
        draw.line((0, height, 2 * middle, height), 200, round(1.6 * scale))
    turned = canvas.rotate(35, Image.Resampling.BICUBIC)
    half = scale * size // 2
    cut = turned.crop((half, half, 3 * half, 3 * half))
    return pil_to_tensor(cut.resize((size, size), Image.Resampling.LANCZOS)).float() / 255


def watermarked(images: Tensor, generator: torch.Generator) -> Tensor:
    """Lay a white word and lines with a dark edge over the image."""
    opacity = watermark(images.shape[-1])
    edge = 0.45 * opacity.roll((1, 1), (-2, -1))
    return (1 - 0.75 * opacity) * (1 - edge) * images + 0.75 * opacity


DEFECTS: dict[str, Defect | None] = {
    "blurred": blurred,
    "noisy": noisy,
    "compressed": compressed,
    "washed out": washed_out,
    "tinted": tinted,
    "watermarked": watermarked,
    "cut off": None,
}


def spoil(images: Tensor, defect: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil each image by the defect of its number, 0 for none; in [0, 1]."""
    spoilt = images.clone()
    for number, function in enumerate(DEFECTS.values(), start=1):
        rows = (defect == number).nonzero()[:, 0]
        if function is not None and len(rows):
            spoilt[rows] = function(images[rows], generator)
    return spoilt.clamp(0, 1)
