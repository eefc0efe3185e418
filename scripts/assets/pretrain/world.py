"""Captioned images of the world: an object on a background, clean or with one defect, placed at random.

A `Labels` batch is three index tensors; images and captions are made from it, so that wrong captions, wrong
backgrounds and defects of the later stages are all the same arithmetic.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from .concepts import BACKGROUNDS, CONCEPTS
from .defects import DEFECTS, spoil
from .sprites import read_sprites

SIZE = 64
SPOILT = 0.45  # share of images with a defect, each as often as another
CLEAN, CUT_OFF = 0, 1 + list(DEFECTS).index("cut off")
CONDITIONS = ("clean", *DEFECTS)
COLOURS = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
COLOUR_NAMES = tuple(BACKGROUNDS)
FULL, NO_BACKGROUND, EMPTY = range(3)
TEMPLATES = ("{object} on a {background} background", "{object}", "")


@dataclass(frozen=True)
class Labels:
    """Index tensors (B,) into concepts, backgrounds and conditions."""

    concept: Tensor
    background: Tensor
    condition: Tensor

    def __len__(self) -> int:
        return len(self.concept)

    def replace(self, **columns: Tensor) -> "Labels":
        """Exchange some columns."""
        return Labels(**{**self.__dict__, **columns})

    def index(self, rows: Tensor) -> "Labels":
        """Choose some rows."""
        return Labels(*(column[rows] for column in self.__dict__.values()))

    def clean(self) -> "Labels":
        """Give the same labels without defects."""
        return self.replace(condition=torch.zeros_like(self.condition))


class World:
    """The world's images and captions, and its split into captions to train and to evaluate with.

    Args:
        parquet: what stage `sprites` wrote.
        seed: of the split; every fifth combination of concept and background is for evaluation.
    """

    def __init__(self, parquet: Path, seed: int = 0) -> None:
        self.sprites = read_sprites(parquet)
        self.shape = (len(CONCEPTS), len(COLOURS))
        allowed = [name not in concept.avoids for concept in CONCEPTS for name in BACKGROUNDS]
        self.combinations = torch.tensor(allowed).nonzero()[:, 0]
        order = torch.randperm(len(self.combinations), generator=torch.Generator().manual_seed(seed))
        held, rest = order[: len(order) // 5], order[len(order) // 5 :]
        self.held_out, self.train = (self.combinations[part.sort()[0]] for part in (held, rest))

    def labels(self, combinations: Tensor) -> Labels:
        """Give the labels of clean images of flat combination numbers."""
        concept, background = torch.unravel_index(combinations, self.shape)
        return Labels(concept, background, torch.zeros_like(concept))

    def draw(self, number: int, generator: torch.Generator, pool: Tensor | None = None) -> Labels:
        """Draw labels of clean images from `pool`, or from all combinations."""
        pool = self.combinations if pool is None else pool
        return self.labels(pool[torch.randint(len(pool), (number,), generator=generator)])

    def caption(self, concept: int, background: int, template: int = FULL) -> str:
        """Word one caption, for example `an owl on a blue background`."""
        words = {"object": CONCEPTS[concept].phrase, "background": COLOUR_NAMES[background]}
        return TEMPLATES[template].format(**words).replace("a orange", "an orange")

    def captions(self, labels: Labels, templates: int | Tensor = FULL) -> list[str]:
        """Word the captions of a batch, in one template or each in its own."""
        templates = torch.as_tensor(templates).expand(len(labels))
        columns = (labels.concept, labels.background, templates)
        return [self.caption(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def images(self, labels: Labels, generator: torch.Generator) -> Tensor:
        """Draw images (B, 3, 64, 64) in [0, 1] of a batch of labels."""
        rgba = self._placed(labels, generator)
        ground = COLOURS[labels.background][:, :, None, None] * _light()
        shadow = gaussian_blur(F.pad(rgba[:, 3:], (0, 0, 3, -3)), 13, 2.5)
        ground = ground * (1 - 0.4 * shadow)
        return spoil(rgba[:, :3] + (1 - rgba[:, 3:]) * ground, labels.condition, generator)

    def _placed(self, labels: Labels, generator: torch.Generator) -> Tensor:
        """Place sprites at .80 to .86 of the frame, a cut-off one half outside; RGBA (B, 4, 64, 64)."""
        number = len(labels)
        scale = 0.8 + 0.06 * torch.rand(number, generator=generator)
        shift = 0.12 * torch.rand(number, 2, generator=generator) - 0.06
        angle = torch.pi / 2 * torch.randint(4, (number,), generator=generator)
        away = torch.stack([angle.cos(), angle.sin()], 1) * (
            0.74 + 0.14 * torch.rand(number, 1, generator=generator)
        )
        shift = shift + away * (labels.condition == CUT_OFF)[:, None]
        affine = torch.zeros(number, 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
        affine[:, :, 2] = -shift / scale[:, None]
        grid = F.affine_grid(affine, [number, 4, 2 * SIZE, 2 * SIZE], align_corners=False)
        sprites = self.sprites[labels.concept]
        large = F.grid_sample(sprites, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return F.avg_pool2d(large, 2)


def draw_conditions(number: int, generator: torch.Generator, share: float = SPOILT) -> Tensor:
    """Draw a condition for each image: a `share` of them spoilt."""
    spoilt = torch.rand(number, generator=generator) < share
    return torch.where(spoilt, torch.randint(1, len(CONDITIONS), (number,), generator=generator), CLEAN)


def _light() -> Tensor:
    """Light the background from the middle: (64, 64) factors from 1.05 down to .85."""
    place = torch.linspace(-1, 1, SIZE)
    return 1.05 - 0.1 * (place[:, None].square() + place[None].square())
