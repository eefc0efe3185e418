"""Base beside tuned: labelled picture grids of fixed prompts and fixed noise."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from am_diffusers.redact import redact_values
from am_diffusers.samples import Picture, Sampler, pictures_of
from am_diffusers.velocity import VelocityField

CELL = 128
MARGIN = 6
LINE = 16


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as 8-bit RGB."""
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def comparison_grid(prompts: Sequence[str], base: Tensor, tuned: Tensor) -> Image.Image:
    """One row a prompt, its text above; columns base, tuned, base, tuned, ... by starting noise.

    Args:
        prompts: P prompts.
        base: base pictures, (P * S, 3, H, W) in [0, 1], prompt by prompt.
        tuned: tuned pictures from the same noise, like `base`.

    Returns:
        RGB picture. Small pictures are enlarged by a whole factor, without smoothing.
    """
    scale = max(1, CELL // base.shape[-1])
    height, width = base.shape[-2] * scale, base.shape[-1] * scale
    columns = 2 * (len(base) // len(prompts))
    row_height = LINE + height + MARGIN
    size = (columns * (width + MARGIN) + MARGIN, LINE + MARGIN + len(prompts) * row_height)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for column in range(columns):
        left = MARGIN + column * (width + MARGIN)
        pen.text((left, 2), ("base", "tuned")[column % 2], fill="black", font=font)
        for row, prompt in enumerate(prompts):
            top = LINE + MARGIN + row * row_height
            picture = (base, tuned)[column % 2][row * columns // 2 + column // 2]
            cell = to_pil(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, top + LINE))
            if column == 0:
                pen.text((left, top), shorten(prompt, font, size[0] - 2 * MARGIN), fill="black", font=font)
    return canvas


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, cut and ended by dots where it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@dataclass(frozen=True)
class GridWriter:
    """Writes `iteration-000050.png` of fixed prompts and noise; base pictures are made once.

    Attributes:
        sampler: makes the pictures.
        base: field before fine-tuning.
        tuned: field that is fine-tuned, with the same guidance as `base`.
        prompts: one row of the grid each.
        images_per_prompt: pairs in a row.
        folder: where the grids go.
    """

    sampler: Sampler
    base: VelocityField
    tuned: VelocityField
    prompts: Sequence[str]
    images_per_prompt: int
    folder: Path

    def __call__(self, iteration: int) -> None:
        """Write the grid of the model after `iteration` optimizer steps."""
        tuned = self.sampler.pictures(self.tuned, self.prompts, self._which)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid = comparison_grid(self.prompts, self._base_pictures, tuned)
        grid.save(self.folder / f"iteration-{iteration:06d}.png")

    @property
    def _which(self) -> list[Picture]:
        return pictures_of(len(self.prompts), self.images_per_prompt)

    @cached_property
    def _base_pictures(self) -> Tensor:
        """Base pictures; beside the first grid go the seeds, to make the same ones with Diffusers."""
        seeds = [
            {**picture._asdict(), "seed": self.sampler.generator(picture).initial_seed()}
            for picture in self._which
        ]
        rows = redact_values({"prompts": list(self.prompts), "pictures": seeds})
        (self.folder / "pictures.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
        return self.sampler.pictures(self.base, self.prompts, self._which)
