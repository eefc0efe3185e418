"""What the tests of model families share: a tiny pipeline of each, a strong LoRA, a point to evaluate at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_diffusers.models.base import Model
from am_diffusers.velocity import Conditioning
from conftest import tiny_pipeline

PROMPTS = ["a red fox", "a blue clock"]


@dataclass(frozen=True)
class Case:
    """A family's tiny pipeline of random weights, and what a test must know of it.

    Attributes:
        pipeline: makes it; 64 x 64 pixels are allowed.
        direct: (network, x, sigma, cond) to the velocity, as a Diffusers user calls the network.
        dead: ending of the names of LoRA weights that have no effect in it.
    """

    pipeline: Callable[[], Any]
    direct: Callable[[torch.nn.Module, Tensor, Tensor, Conditioning], Tensor]
    dead: str


def strong_lora(model: Model, seed: int = 0, *, rank: int = 4, lora_alpha: int = 8) -> Model:
    """Attach a LoRA that changes the velocity by about its own size."""
    model.attach_lora(rank=rank, lora_alpha=lora_alpha)
    redraw_lora(model, seed)
    return model


def redraw_lora(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.lora_parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def point(model: Model, seed: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    """Arguments of a field: two latents at different noise levels."""
    x = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0.8, 0.3]), model.encode_prompts(PROMPTS, max_sequence_length=8)


def direct(transformer: torch.nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """The transformer as a Diffusers user calls it."""
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=cond.embeddings,
        pooled_projections=cond.pooled,
    ).sample


CASES = {
    # The last block's text query has no effect: its text stream ends there.
    "StableDiffusion3Pipeline": Case(tiny_pipeline, direct, "transformer_blocks.1.attn.add_q_proj"),
}
