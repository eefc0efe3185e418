"""Pairs of images for one caption, a better and a worse, and how well a reward orders them.

The better one is clean and right. The worse one has a defect, another background, another object, or was
badly generated. Each reward learns from captions and images of its own: the others judge it from outside.
"""

from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .defects import DEFECTS
from .loop import Loop, fast
from .transformer import SHORT_CONTEXT, CaptionCache, new_transformer
from .world import COLOURS, CONCEPTS, Labels, World

KINDS = (*DEFECTS, "wrong background", "wrong object", "generated")
WRONG_BACKGROUND, WRONG_OBJECT, GENERATED = (KINDS.index(kind) for kind in KINDS[-3:])
BAD_STEPS = (2, 3, 4)  # Euler steps of the badly generated images: blobs, even of a good model
SEEDS = {"pickscore": 1, "hpsv2": 2, "image_reward": 3}


def own_part(world: World, name: str) -> Tensor:
    """Choose three quarters of the combinations to train with, others for each reward."""
    generator = torch.Generator().manual_seed(SEEDS[name])
    order = torch.randperm(len(world.train), generator=generator)
    return world.train[order[: 3 * len(order) // 4].sort()[0]]


@torch.no_grad()
def generate(
    transformer: torch.nn.Module,
    captions: CaptionCache,
    texts: list[str],
    *,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw latents by `steps` unguided Euler steps of equal length."""
    tokens, pooled = captions(texts, SHORT_CONTEXT)
    shape = (transformer.config.in_channels, *2 * (transformer.config.sample_size,))
    x = torch.randn(len(texts), *shape, generator=generator).to(tokens.device)
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, following in pairwise(sigmas.tolist()):
        with fast(x.device):
            velocity = transformer(
                hidden_states=x,
                timestep=torch.full((len(x),), 1000 * sigma, device=x.device),
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        x = x + (following - sigma) * velocity.float()
    return x


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled latents to images in [0, 1]."""
    with fast(latents.device):
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def current_models(loop: Loop) -> tuple[torch.nn.Module, AutoencoderKL]:
    """Load the transformer's averaged weights of its last state, and the VAE."""
    transformer = new_transformer()
    transformer.load_state_dict(torch.load(loop.folder / "transformer.pt", weights_only=True)["ema"])
    return transformer.to(loop.device), AutoencoderKL.from_pretrained(loop.folder / "vae").to(loop.device)


def save_generated(world: World, loop: Loop) -> None:
    """Save `loop.steps` batches of badly generated images to `generated.pt`."""
    transformer, vae = current_models(loop)
    captions = CaptionCache(world, loop)
    images, rows = [], []
    for part in range(loop.steps):
        generator = torch.Generator().manual_seed(part)
        labels = world.draw(loop.batch, generator)
        steps = BAD_STEPS[part % len(BAD_STEPS)]
        latents = generate(transformer, captions, world.captions(labels), steps=steps, generator=generator)
        images.append((decode(vae, latents).cpu() * 255).round().byte())
        rows.append(torch.stack([labels.concept, labels.background]))
    torch.save({"images": torch.cat(images), "labels": torch.cat(rows, 1)}, loop.folder / "generated.pt")


def other(column: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Exchange each index below `number` for another one."""
    return (column + torch.randint(1, number, column.shape, generator=generator)) % number


class Pairs:
    """Pairs of better and worse images, drawn from some combinations and from the generated images.

    Args:
        world: images and captions.
        pool: the combinations.
        folder: where `generated.pt` is, if it was made; without it that kind is missing.
        held_out: take the last tenth of the generated images, otherwise all others.
    """

    def __init__(self, world: World, pool: Tensor, folder: Path, *, held_out: bool = False) -> None:
        self.world, self.pool, self.rows = world, pool, torch.zeros(0, dtype=torch.long)
        file = folder / "generated.pt"
        if file.exists():
            self.bank = torch.load(file, weights_only=True)
            split = len(self.bank["images"]) * 9 // 10
            self.rows = torch.arange(split, len(self.bank["images"])) if held_out else torch.arange(split)
        self.kinds = KINDS if len(self.rows) else KINDS[:GENERATED]

    def draw(self, kinds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Labels]:
        """Draw one pair of each of `kinds`: better images, worse ones, and labels of the better ones."""
        labels = self.world.draw(len(kinds), generator, self.pool)
        made = kinds == GENERATED
        if made.any():
            rows = self.rows[torch.randint(len(self.rows), (int(made.sum()),), generator=generator)]
            concept, background = labels.concept.clone(), labels.background.clone()
            concept[made], background[made] = self.bank["labels"][:, rows]
            labels = labels.replace(concept=concept, background=background)
        worse = self.world.images(self._spoilt(labels, kinds, generator), generator)
        if made.any():
            worse[made] = self.bank["images"][rows].float() / 255
        return self.world.images(labels, generator), worse, labels

    def _spoilt(self, labels: Labels, kinds: Tensor, generator: torch.Generator) -> Labels:
        concept = other(labels.concept, len(CONCEPTS), generator)
        background = other(labels.background, len(COLOURS), generator)
        return Labels(
            torch.where(kinds == WRONG_OBJECT, concept, labels.concept),
            torch.where(kinds == WRONG_BACKGROUND, background, labels.background),
            torch.where(kinds < len(DEFECTS), kinds + 1, 0),
        )


@torch.no_grad()
def pair_accuracy(reward, world: World, folder: Path, number: int = 200) -> dict[str, float]:
    """Give the share of held-out pairs of each kind that `reward(images, prompts)` orders rightly."""
    pairs = Pairs(world, world.held_out, folder, held_out=True)
    result = {}
    for kind, title in enumerate(pairs.kinds):
        generator = torch.Generator().manual_seed(7_000_000 + kind)
        better, worse, labels = pairs.draw(torch.full((number,), kind), generator)
        captions = world.captions(labels)
        result[title] = (reward(better, captions) > reward(worse, captions)).float().mean().item()
    return result | {"mean": sum(result.values()) / len(result)}
