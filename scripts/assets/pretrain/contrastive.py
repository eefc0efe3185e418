"""Contrastive training of image and caption towers, with hard negatives and without false ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import FULL, NO_BACKGROUND, Labels, World

TEMPLATE_CHANCES = {FULL: 0.8, NO_BACKGROUND: 0.2}


def hard_batch(world: World, number: int, generator: torch.Generator, pool: Tensor | None = None) -> Labels:
    """Draw labels of which half come in fours that share the concept, so that backgrounds must be read."""
    labels = world.draw(number, generator, pool)
    concept = labels.concept.clone()
    concept[: number // 2] = concept[: number // 2].view(-1, 4)[:, :1].expand(-1, 4).flatten()
    flat = concept * world.shape[1] + labels.background
    allowed = torch.isin(flat, world.combinations if pool is None else pool)
    return labels.replace(concept=torch.where(allowed, concept, labels.concept))


def draw_captions(world: World, labels: Labels, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Draw a caption for each label, some without background, and the template of each."""
    chances = torch.tensor(list(TEMPLATE_CHANCES.values()))
    templates = torch.multinomial(chances, len(labels), replacement=True, generator=generator)
    templates = torch.tensor(list(TEMPLATE_CHANCES))[templates]
    return world.captions(labels, templates), templates


def matches(labels: Labels, templates: Tensor) -> Tensor:
    """Say which caption j is true of which image i, (images, captions)."""
    background = (labels.background[:, None] == labels.background[None]) | (templates == NO_BACKGROUND)[None]
    return (labels.concept[:, None] == labels.concept[None]) & background


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Give the symmetric InfoNCE of features; other true captions of an image are not negatives."""
    logits = scale * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(true.to(logits.device) & ~own, -1e4)
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
