"""What the tests of models/sd3.py share: a strong LoRA, a point to evaluate at, the transformer itself."""

import torch
from torch import Tensor

from am_diffusers.models.base import Model
from am_diffusers.velocity import Conditioning

PROMPTS = ["a red fox", "a blue clock"]


def strong_lora(model: Model, seed: int = 0) -> Model:
    """Attach a LoRA that changes the velocity by about its own size."""
    model.attach_lora(rank=4, lora_alpha=8)
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
