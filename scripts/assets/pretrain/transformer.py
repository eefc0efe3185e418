"""Stage `transformer`: SD3Transformer2DModel on cached latents and cached caption embeddings.

Flow matching: x_sigma = (1 - sigma) clean + sigma noise, and the network learns noise - clean (Esser et al.,
arXiv:2403.03206), with sigma logit-normal.
"""

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .loop import Loop, fast, gather
from .vae import LATENT_CHANNELS, LATENT_SIZE
from .world import EMPTY, FULL, NO_BACKGROUND, Labels, World, draw_conditions

VARIANTS = 160  # cached images of each combination of concept and background
CHUNK = 64
SHORT_CONTEXT, LONG_CONTEXT, LONG_EVERY = 4, 256, 40
TEMPLATE_CHANCES = {FULL: 0.8, NO_BACKGROUND: 0.1, EMPTY: 0.1}


def new_transformer() -> SD3Transformer2DModel:
    """Make an untrained transformer of the shipped size: 7.8 million parameters."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=256,
        caption_projection_dim=192,
        pooled_projection_dim=256,
        pos_embed_max_size=LATENT_SIZE,
    )


class CaptionCache:
    """Token and pooled embeddings of every caption, as the pipeline computes them without T5."""

    def __init__(self, world: World, loop: Loop) -> None:
        texts = {c for t in TEMPLATE_CHANCES for c in world.captions(world.labels(world.combinations), t)}
        self.rows = {caption: row for row, caption in enumerate(sorted(texts))}
        hidden, pooled = [], []
        for suffix in ("", "_2"):
            tokenizer = CLIPTokenizer.from_pretrained(loop.folder / f"tokenizer{suffix}")
            tower = CLIPTextModelWithProjection.from_pretrained(loop.folder / f"text_encoder{suffix}").eval()
            tokens = tokenizer(sorted(texts), padding="max_length", truncation=True, return_tensors="pt")
            with torch.no_grad():
                output = tower(tokens.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        self.hidden = torch.cat(hidden, dim=-1).to(loop.device)
        self.pooled = torch.cat(pooled, dim=-1).to(loop.device)

    def __call__(self, captions: list[str], zeros: int) -> tuple[Tensor, Tensor]:
        """Look up embeddings (B, 12 + zeros, 256) and pooled embeddings (B, 256)."""
        rows = [self.rows[caption] for caption in captions]
        return pad(self.hidden[rows], (0, 0, 0, zeros)), self.pooled[rows]


def cache_latents(world: World, loop: Loop) -> tuple[Tensor, Labels]:
    """Encode `VARIANTS` images of each combination, once: scaled latents in float16, and their labels."""
    vae = AutoencoderKL.from_pretrained(loop.folder / "vae").to(loop.device)
    order = torch.Generator().manual_seed(0)
    parts = torch.cat(
        [
            world.combinations[torch.randperm(len(world.combinations), generator=order)]
            for _ in range(VARIANTS)
        ]
    ).split(CHUNK)

    @torch.no_grad()
    def encode(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        labels = world.labels(parts[number])
        labels = labels.replace(condition=draw_conditions(len(labels), generator))
        images = (2 * world.images(labels, generator) - 1).to(loop.device)
        with fast(loop.device):
            mode = vae.encode(images).latent_dist.mode().float()
        latents = ((mode - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu()
        return {"latents": latents} | labels.__dict__

    state = gather(loop.folder / "latents.pt", len(parts), encode)
    return state.pop("latents"), Labels(**state)


def draw_templates(number: int, generator: torch.Generator) -> Tensor:
    """Draw a caption template for each row."""
    chances = torch.tensor(list(TEMPLATE_CHANCES.values()))
    chosen = torch.multinomial(chances, number, replacement=True, generator=generator)
    return torch.tensor(list(TEMPLATE_CHANCES))[chosen]


def train_transformer(world: World, loop: Loop) -> None:
    """Train by flow matching and save the averaged weights to `transformer` in the loop's folder."""
    torch.manual_seed(0)
    transformer = new_transformer().to(loop.device)
    captions = CaptionCache(world, loop)
    latents, labels = cache_latents(world, loop)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (loop.batch,), generator=generator)
        clean = latents[rows].float().to(loop.device)
        noise = torch.randn(clean.shape, generator=generator).to(loop.device)
        sigma = torch.randn(loop.batch, generator=generator).sigmoid().to(loop.device)
        level = sigma[:, None, None, None]
        texts = world.captions(labels.index(rows), draw_templates(loop.batch, generator))
        zeros = LONG_CONTEXT if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_CONTEXT
        tokens, pooled = captions(texts, zeros)
        with fast(loop.device):
            velocity = transformer(
                hidden_states=(1 - level) * clean + level * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return (velocity.float() - (noise - clean)).square().mean(), {}

    ema = loop.train(transformer, loss_of_step, peak_rate=8e-4, name="transformer")
    transformer.load_state_dict(ema.values)
    transformer.cpu().save_pretrained(loop.folder / "transformer")
