"""Stages `generated`, `pickscore`, `hpsv2`: preferences between pictures for one caption, Bradley-Terry."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import corruptions
from .contrastive import contrastive_loss, draw_captions, hard_batch, matches
from .data import FULL, Labels, PictureSet
from .loop import train
from .text import caption_vocabulary
from .tokens import clip_tokenizer
from .towers import SEEDS, new_towers, own_part, save_hpsv2, save_pickscore
from .transformer import SHORT_CONTEXT, CaptionCache, fast_cpu, new_transformer

CORRUPTIONS = {
    "pickscore": corruptions.PICKSCORE,
    "hpsv2": corruptions.HPSV2,
    "image_reward": corruptions.IMAGE_REWARD,
}
BAD_STEPS = (3, 6, 12)  # Euler steps of the badly generated pictures


@torch.no_grad()
def generate(
    transformer, captions: CaptionCache, texts: list[str], steps: int, generator: torch.Generator
) -> Tensor:
    """Latents (B, 8, 16, 16) by `steps` unguided Euler steps on a uniform grid."""
    tokens, pooled = captions(texts, SHORT_CONTEXT)
    x = torch.randn(len(texts), 8, 16, 16, generator=generator)
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, following in pairwise(sigmas):
        with fast_cpu():
            velocity = transformer(
                hidden_states=x,
                timestep=1000 * sigma.expand(len(x)),
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        x = x + (following - sigma) * velocity.float()
    return x


def save_generated(data: PictureSet, folder: Path, number: int) -> None:
    """Badly generated pictures of training captions, from the transformer's current weights."""
    transformer = new_transformer()
    transformer.load_state_dict(torch.load(folder / "transformer.pt", weights_only=True)["ema"])
    vae, captions = AutoencoderKL.from_pretrained(folder / "vae"), CaptionCache(data, folder)
    pictures, rows = [], []
    for part in range(number // 64):
        generator = torch.Generator().manual_seed(part)
        labels = data.draw(64, generator)
        latents = generate(
            transformer, captions, data.captions(labels), BAD_STEPS[part % len(BAD_STEPS)], generator
        )
        with torch.no_grad(), fast_cpu():
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        pictures.append(((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte())
        rows.append(torch.stack([labels.concept, labels.style, labels.background]))
    torch.save({"pictures": torch.cat(pictures), "labels": torch.cat(rows, dim=1)}, folder / "generated.pt")


class Pairs:
    """(better, worse, labels) pictures for the same full caption, from corruptions or the generated bank."""

    def __init__(
        self, data: PictureSet, kinds: tuple[corruptions.Corruption, ...], bank: dict[str, Tensor]
    ) -> None:
        self.data, self.kinds, self.bank = data, kinds, bank
        self.split = len(bank["pictures"]) * 9 // 10

    def draw(self, kind: int, number: int, generator: torch.Generator, *, held_out: bool = False):
        """Pairs of one kind; the last kind is the generated one."""
        if kind < len(self.kinds):
            labels = self.data.draw(number, generator, held_out=held_out)
            worse = self.kinds[kind](self.data, labels, generator)
        else:
            low, high = (self.split, len(self.bank["pictures"])) if held_out else (0, self.split)
            rows = torch.randint(low, high, (number,), generator=generator)
            labels = Labels(*self.bank["labels"][:, rows])
            worse = self.bank["pictures"][rows].float() / 255
        return self.data.pictures(labels, generator), worse, labels


def train_preferences(data: PictureSet, folder: Path, name: str, steps: int, batch: int = 48) -> None:
    """Fine-tune the towers of reward `name` on preferences and captions, and save the reward."""
    merges = caption_vocabulary(data, folder)
    tokenizer, towers = clip_tokenizer(merges), new_towers(name, len(clip_tokenizer(merges)))
    towers.load_state_dict(torch.load(folder / f"{name}_towers_ema.pt", weights_only=True))
    part = own_part(data, name)
    pairs = Pairs(part, CORRUPTIONS[name], torch.load(folder / "generated.pt", weights_only=True))

    def tokens_of(captions: list[str]) -> Tensor:
        return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(1_000_000 * SEEDS[name] + 500_000 + step)
        labels = hard_batch(part, batch, generator)
        captions, templates = draw_captions(part, labels, generator)
        better, worse, own = pairs.draw(step % (len(pairs.kinds) + 1), batch // 2, generator)
        with torch.autocast("cpu", torch.bfloat16):
            pictures = torch.cat([part.pictures(labels, generator), better, worse])
            images = F.normalize(towers.images(pictures).float(), dim=-1)
            texts = F.normalize(towers.texts(tokens_of(captions + part.captions(own))).float(), dim=-1)
        true = matches(labels, templates)
        contrast = contrastive_loss(images[:batch], texts[:batch], towers.scale, true)
        liked, disliked = ((part_ * texts[batch:]).sum(-1) for part_ in images[batch:].chunk(2))
        preference = -F.logsigmoid(towers.scale * (liked - disliked)).mean()
        return contrast + preference, {
            "contrast": contrast.item(),
            "accuracy": (liked > disliked).float().mean().item(),
        }

    with sdpa_kernel(SDPBackend.MATH):
        ema = train(towers, loss_of_step, steps=steps, peak_rate=3e-4, state_file=folder / f"{name}.pt")
    towers.load_state_dict(ema.values)
    with torch.no_grad():
        towers.model.logit_scale.copy_(towers.scale.log())
    save = {"pickscore": save_pickscore, "hpsv2": save_hpsv2}[name]
    save(towers, merges, folder / f"tiny_{name}")


@torch.no_grad()
def pair_accuracy(reward, data: PictureSet, folder: Path, name: str, number: int = 200) -> dict[str, float]:
    """Share of held-out pairs of each kind that `reward(images, prompts)` orders rightly, and their mean."""
    pairs = Pairs(data, CORRUPTIONS[name], torch.load(folder / "generated.pt", weights_only=True))
    names = [kind.__name__ for kind in pairs.kinds] + ["generated"]
    result = {}
    for kind, title in enumerate(names):
        generator = torch.Generator().manual_seed(7_000_000 + kind)
        better, worse, labels = pairs.draw(kind, number, generator, held_out=True)
        captions = data.captions(labels, FULL)
        result[title] = (reward(better, captions) > reward(worse, captions)).float().mean().item()
    return result | {"mean": sum(result.values()) / len(names)}
