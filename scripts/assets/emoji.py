"""Captioned pictures for the tiny pipeline: concept x style x background, placed at random.

A `Label` batch is three index tensors; pictures and captions are made from it, so that the held-out
combinations, wrong captions and wrong backgrounds of the later stages are all the same arithmetic.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "gray": (140, 140, 140),
    "red": (210, 45, 45),
    "orange": (250, 145, 35),
    "yellow": (250, 220, 70),
    "green": (60, 165, 85),
    "blue": (55, 105, 215),
    "purple": (135, 70, 185),
    "pink": (250, 165, 205),
}
COLOURS = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
COLOUR_NAMES = tuple(BACKGROUNDS)
FULL, NO_STYLE, NO_BACKGROUND, CONCEPT, EMPTY = range(5)
TEMPLATES = (
    "{concept}, {style} style, on a {background} background",
    "{concept} on a {background} background",
    "{concept}, {style} style",
    "{concept}",
    "",
)


@dataclass(frozen=True)
class Labels:
    """Index tensors (B,) into concepts, styles and background colours."""

    concept: Tensor
    style: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.concept)

    def replace(self, **columns: Tensor) -> "Labels":
        """The same labels with some columns exchanged."""
        return Labels(**{**self.__dict__, **columns})

    def index(self, rows: Tensor) -> "Labels":
        """The labels of some rows."""
        return Labels(self.concept[rows], self.style[rows], self.background[rows])

    def same(self, other: "Labels") -> Tensor:
        """(B, B') mask of equal (concept, style, background)."""
        pairs = (
            (self.concept, other.concept),
            (self.style, other.style),
            (self.background, other.background),
        )
        return torch.stack([a[:, None] == b[None] for a, b in pairs]).all(0)


class PictureSet:
    """The committed picture set, its captions and its split into training and held-out combinations.

    Args:
        parquet: rows of concept, style and a 64 x 64 RGBA PNG.
        seed: of the split; every tenth combination is held out.
    """

    def __init__(self, parquet: Path, seed: int = 0) -> None:
        rows = pq.read_table(parquet).to_pylist()
        self.concepts = tuple(dict.fromkeys(row["concept"] for row in rows))
        self.styles = tuple(dict.fromkeys(row["style"] for row in rows))
        bank = np.stack([np.asarray(Image.open(io.BytesIO(row["png"]))) for row in rows])
        rgba = torch.from_numpy(bank).permute(0, 3, 1, 2).float() / 255
        rgba[:, :3] *= rgba[:, 3:]  # premultiplied, so that resampling has no dark fringes
        self.bank = rgba.view(len(self.concepts), len(self.styles), 4, *rgba.shape[-2:])
        self.shape = (len(self.concepts), len(self.styles), len(COLOURS))
        order = torch.randperm(int(np.prod(self.shape)), generator=torch.Generator().manual_seed(seed))
        self.held_out, self.train = order[: len(order) // 10].sort()[0], order[len(order) // 10 :].sort()[0]

    def labels(self, combinations: Tensor) -> Labels:
        """Labels of flat combination numbers."""
        return Labels(*torch.unravel_index(combinations, self.shape))

    def draw(self, number: int, generator: torch.Generator, *, held_out: bool = False) -> Labels:
        """Random labels from one side of the split."""
        pool = self.held_out if held_out else self.train
        return self.labels(pool[torch.randint(len(pool), (number,), generator=generator)])

    def caption(self, concept: int, style: int, background: int, template: int = FULL) -> str:
        """One caption, for example `red apple, 3d style, on a blue background`."""
        words = {"concept": self.concepts[concept], "style": self.styles[style]}
        return TEMPLATES[template].format(**words, background=COLOUR_NAMES[background])

    def captions(self, labels: Labels, templates: int | Tensor = FULL) -> list[str]:
        """The captions of a batch, in one template or each in its own."""
        templates = torch.as_tensor(templates).expand(len(labels))
        columns = (labels.concept, labels.style, labels.background, templates)
        return [self.caption(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def foreground(self, labels: Labels, generator: torch.Generator) -> Tensor:
        """Premultiplied RGBA (B, 4, 64, 64): scaled by .74-.94, shifted in the frame, half mirrored."""
        number = len(labels)
        scale = 0.74 + 0.2 * torch.rand(number, generator=generator)
        shift = (2 * torch.rand(number, 2, generator=generator) - 1) * (1 - scale[:, None])
        mirror = torch.where(torch.rand(number, generator=generator) < 0.5, -1.0, 1.0)
        affine = torch.zeros(number, 2, 3)
        affine[:, 0, 0], affine[:, 1, 1] = mirror / scale, 1 / scale
        affine[:, 0, 2], affine[:, 1, 2] = -shift[:, 0] * mirror / scale, -shift[:, 1] / scale
        pictures = self.bank[labels.concept, labels.style]
        grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
        return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def pictures(self, labels: Labels, generator: torch.Generator) -> Tensor:
        """Pictures (B, 3, 64, 64) in [0, 1] of a batch of labels."""
        rgba = self.foreground(labels, generator)
        return (rgba[:, :3] + (1 - rgba[:, 3:]) * COLOURS[labels.background][:, :, None, None]).clamp(0, 1)


def background_of(pictures: Tensor) -> Tensor:
    """Index of the named colour nearest to the median of the frame's corner pixels, (B,)."""
    size = pictures.shape[-1]
    ends = torch.tensor([0, 1, 2, size - 3, size - 2, size - 1])
    corners = pictures[:, :, ends][:, :, :, ends].flatten(2).median(2)[0]
    return torch.cdist(corners, COLOURS.to(corners)).argmin(1)
