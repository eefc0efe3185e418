"""Contrastive training of picture and caption towers, with hard negatives and without false ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import NO_BACKGROUND, NO_STYLE, Labels, PictureSet


def hard_batch(data: PictureSet, number: int, generator: torch.Generator) -> Labels:
    """Labels of which half come in fours that share the concept: style and background must be read."""
    labels = data.draw(number, generator)
    concept = labels.concept.clone()
    concept[: number // 2] = concept[: number // 2].view(-1, 4)[:, :1].expand(-1, 4).flatten()
    drawn = labels.replace(concept=concept)
    flat = (drawn.concept * data.shape[1] + drawn.style) * data.shape[2] + drawn.background
    allowed = torch.isin(flat, data.train)
    return labels.replace(concept=torch.where(allowed, concept, labels.concept))


def draw_captions(data: PictureSet, labels: Labels, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """A caption for each label, some without style or background, and the template of each."""
    chances = torch.tensor([0.7, 0.15, 0.15])  # FULL, NO_STYLE, NO_BACKGROUND
    templates = torch.multinomial(chances, len(labels), replacement=True, generator=generator)
    return data.captions(labels, templates), templates


def matches(labels: Labels, templates: Tensor) -> Tensor:
    """(pictures, captions) mask: caption j is true of picture i."""
    style = (labels.style[:, None] == labels.style[None]) | (templates == NO_STYLE)[None]
    background = (labels.background[:, None] == labels.background[None]) | (templates == NO_BACKGROUND)[None]
    return (labels.concept[:, None] == labels.concept[None]) & style & background


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Symmetric InfoNCE over normalised features; other true captions of a picture are not negatives."""
    logits = scale * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    own = torch.eye(len(logits), dtype=torch.bool)
    logits = logits.masked_fill(true & ~own, -1e4)
    target = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
