"""Ways to make a picture worse; each reward is trained on its own half, so that the other is held out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from .data import COLOURS, Labels, PictureSet

Corruption = Callable[[PictureSet, Labels, torch.Generator], Tensor]


def blurred(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """Gaussian blur of 1.2 to 3 pixels, one strength a batch."""
    strength = 1.2 + 1.8 * torch.rand((), generator=generator).item()
    return gaussian_blur(data.pictures(labels, generator), 9, strength)


def noisy(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """White noise of standard deviation .08 to .25."""
    pictures = data.pictures(labels, generator)
    strength = 0.08 + 0.17 * torch.rand(len(labels), 1, 1, 1, generator=generator)
    return (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def faded(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """Foreground mixed with 40 to 80 % of the background."""
    rgba = data.foreground(labels, generator)
    rgba = rgba * (0.2 + 0.4 * torch.rand(len(labels), 1, 1, 1, generator=generator))
    return (rgba[:, :3] + (1 - rgba[:, 3:]) * COLOURS[labels.background][:, :, None, None]).clamp(0, 1)


def pixelated(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """Reduced to 16 x 16 pixels and back."""
    small = F.interpolate(data.pictures(labels, generator), size=16, mode="area")
    return F.interpolate(small, size=data.bank.shape[-1], mode="nearest")


def recoloured(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """Foreground with rotated colour channels on the right background."""
    rgba = data.foreground(labels, generator)
    turn = 1 + int(torch.randint(2, (), generator=generator))
    rgb = rgba[:, :3].roll(turn, dims=1)
    return (rgb + (1 - rgba[:, 3:]) * COLOURS[labels.background][:, :, None, None]).clamp(0, 1)


def shuffled(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """The four by four tiles of the picture, six of them exchanged."""
    tiles = F.unfold(data.pictures(labels, generator), 16, stride=16)
    order = torch.arange(16)
    picked = torch.randperm(16, generator=generator)[:6]
    order[picked] = picked.roll(1)
    return F.fold(tiles[:, :, order], data.bank.shape[-1], 16, stride=16)


def _other(column: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return (column + torch.randint(1, number, column.shape, generator=generator)) % number


def wrong_background(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """The right object on another named colour."""
    background = _other(labels.background, len(COLOURS), generator)
    return data.pictures(labels.replace(background=background), generator)


def wrong_concept(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """Another object on the right background."""
    concept = _other(labels.concept, len(data.concepts), generator)
    return data.pictures(labels.replace(concept=concept), generator)


def wrong_style(data: PictureSet, labels: Labels, generator: torch.Generator) -> Tensor:
    """The right object in another style."""
    return data.pictures(labels.replace(style=_other(labels.style, len(data.styles), generator)), generator)


PICKSCORE: tuple[Corruption, ...] = (blurred, noisy, faded, wrong_background, wrong_concept)
HPSV2: tuple[Corruption, ...] = (
    pixelated,
    recoloured,
    shuffled,
    wrong_style,
    wrong_background,
    wrong_concept,
)
IMAGE_REWARD: tuple[Corruption, ...] = (
    blurred,
    noisy,
    pixelated,
    recoloured,
    wrong_style,
    wrong_background,
    wrong_concept,
)
