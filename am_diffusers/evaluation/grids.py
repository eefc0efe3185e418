"""Base beside tuned: labelled image grids of fixed prompts and fixed noise."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128
MARGIN = 6
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_pil(image: Tensor) -> Image.Image:
    """Return an image (3, H, W) in [0, 1] as 8-bit RGB."""
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def comparison_grid(
    prompts: Sequence[str],
    base: Sequence[Image.Image],
    tuned: Sequence[Image.Image],
    *,
    captions: tuple[Sequence[str], Sequence[str]] | None = None,
    legend: str = "",
) -> Image.Image:
    """Draw one row a prompt, its text above; columns base, tuned, base, tuned, ... by starting noise.

    Args:
        prompts: P prompts.
        base: P * S base images of one size, prompt by prompt.
        tuned: tuned images from the same noise, like `base`.
        captions: a line under each image of `base` and of `tuned`.
        legend: what the captions are, a line at the end.

    Returns:
        RGB image. Small images are enlarged by a whole factor, without smoothing.
    """
    scale = max(1, CELL // base[0].width)
    width, height = base[0].width * scale, base[0].height * scale
    size = max(12, width // 32)
    font, line = ImageFont.load_default(size=size), size * 4 // 3
    columns = 2 * (len(base) // len(prompts))
    row_height = line + height + (line if captions else 0) + MARGIN
    footer = line if captions else 0
    area = (columns * (width + MARGIN) + MARGIN, line + MARGIN + len(prompts) * row_height + footer)
    canvas = Image.new("RGB", area, "white")
    pen = ImageDraw.Draw(canvas)

    def write(left: int, top: int, text: str, room: int) -> None:
        pen.text((left, top), shorten(text, font, room), fill="black", font=font)

    for column in range(columns):
        left, side = MARGIN + column * (width + MARGIN), column % 2
        write(left, 2, ("base", "tuned")[side], width)
        for row, prompt in enumerate(prompts):
            top, index = line + MARGIN + row * row_height, row * columns // 2 + column // 2
            cell = (base, tuned)[side][index].resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, top + line))
            if column == 0:
                write(left, top, prompt, area[0] - 2 * MARGIN)
            if captions:
                write(left, top + line + height + 1, captions[side][index], width)
    write(MARGIN, area[1] - footer, legend, area[0] - 2 * MARGIN)
    return canvas


def shorten(text: str, font: Font, width: int) -> str:
    """Return `text`, cut and ended by dots where it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
