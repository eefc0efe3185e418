"""Stage `transformer`: SD3Transformer2DModel on cached latents and cached caption embeddings."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .data import CONCEPT, EMPTY, FULL, NO_BACKGROUND, NO_STYLE, PictureSet
from .loop import train

VARIANTS = 8
SHORT_CONTEXT, LONG_CONTEXT, LONG_EVERY = 8, 256, 20
TEMPLATE_CHANCES = {FULL: 0.62, NO_STYLE: 0.12, NO_BACKGROUND: 0.1, CONCEPT: 0.06, EMPTY: 0.1}


def new_transformer() -> SD3Transformer2DModel:
    """An untrained transformer of the shipped size: 10.6 million parameters."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=56,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=224,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
    )


@contextmanager
def fast_cpu() -> Iterator[None]:
    """bfloat16 autocast with the plain attention kernel: the fused one is slower backwards on the CPU."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


class CaptionCache:
    """Token and pooled embeddings of every caption, as the pipeline computes them without T5."""

    def __init__(self, data: PictureSet, folder: Path) -> None:
        self.data = data
        every = data.labels(torch.arange(math.prod(data.shape)))
        texts = {c for template in TEMPLATE_CHANCES for c in data.captions(every, template)}
        self.rows = {caption: row for row, caption in enumerate(sorted(texts))}
        hidden, pooled = [], []
        for suffix in ("", "_2"):
            tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
            tower = CLIPTextModelWithProjection.from_pretrained(folder / f"text_encoder{suffix}").eval()
            tokens = tokenizer(
                sorted(texts), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                outputs = [tower(chunk, output_hidden_states=True) for chunk in tokens.split(256)]
            hidden.append(torch.cat([out.hidden_states[-2] for out in outputs]))
            pooled.append(torch.cat([out.text_embeds for out in outputs]))
        self.hidden, self.pooled = torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1)

    def __call__(self, captions: list[str], zeros: int) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 16 + zeros, 256) and pooled embeddings (B, 256)."""
        rows = [self.rows[caption] for caption in captions]
        return torch.nn.functional.pad(self.hidden[rows], (0, 0, 0, zeros)), self.pooled[rows]


@torch.no_grad()
def cache_latents(data: PictureSet, vae: AutoencoderKL, file: Path) -> Tensor:
    """Scaled latents (combinations, VARIANTS, 8, 16, 16) in float16 of the training pictures."""
    if file.exists():
        return torch.load(file, weights_only=True)
    rows = []
    for number, chunk in enumerate(data.train.split(64)):
        generator = torch.Generator().manual_seed(number)
        labels = data.labels(chunk.repeat_interleave(VARIANTS))
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(2 * data.pictures(labels, generator) - 1).latent_dist.mode().float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        rows.append(latents.view(len(chunk), VARIANTS, *latents.shape[1:]).half())
    torch.save(torch.cat(rows), file)
    return torch.cat(rows)


def draw_templates(number: int, generator: torch.Generator) -> Tensor:
    """A caption template for each row."""
    chances = torch.tensor([TEMPLATE_CHANCES[i] for i in range(len(TEMPLATE_CHANCES))])
    return torch.multinomial(chances, number, replacement=True, generator=generator)


def train_transformer(data: PictureSet, folder: Path, steps: int, batch: int = 64) -> None:
    """Train by flow matching (logit-normal sigmas) and save to `folder / transformer`."""
    torch.manual_seed(0)
    transformer = new_transformer()
    captions = CaptionCache(data, folder)
    latents = cache_latents(data, AutoencoderKL.from_pretrained(folder / "vae"), folder / "latents.pt")

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(data.train), (batch,), generator=generator)
        clean = latents[rows, torch.randint(VARIANTS, (batch,), generator=generator)].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.randn(batch, generator=generator).sigmoid()
        level = sigma[:, None, None, None]
        templates = draw_templates(batch, generator)
        zeros = LONG_CONTEXT if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_CONTEXT
        tokens, pooled = captions(data.captions(data.labels(data.train[rows]), templates), zeros)
        with fast_cpu():
            velocity = transformer(
                hidden_states=(1 - level) * clean + level * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            loss = (velocity.float() - (noise - clean)).square().mean()
        return loss, {}

    state = folder / "transformer.pt"
    with sdpa_kernel(SDPBackend.MATH):
        ema = train(transformer, loss_of_step, steps=steps, peak_rate=6e-4, state_file=state)
    transformer.load_state_dict(ema.values)
    transformer.save_pretrained(folder / "transformer")
