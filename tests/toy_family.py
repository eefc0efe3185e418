"""A model family in one file: Stable Diffusion 3's networks, on a clock, grid and mask of the toy's own."""

from dataclasses import replace

import torch

from am_diffusers.models.sd3 import SD3
from am_diffusers.transitions import shifted_sigmas


def _velocity(network, x, sigma, cond):
    """The network is taken to have learned `clean - noise` at the time of the data; the mask hides tokens."""
    hidden = replace(cond, embeddings=cond.embeddings * cond.mask[..., None])
    return -SD3.velocity(network, x, 1 - sigma, hidden)


def _encode(pipe, texts, max_sequence_length):
    rows = SD3.encode(pipe, texts, max_sequence_length)
    return [row._replace(mask=torch.arange(len(row.embeddings)) < 16) for row in rows]


def _mu(config, shape, num_steps):
    """The shift grows with the number of latents, as where a scheduler is dynamic."""
    return 1 + shape[-1] * shape[-2] / 256


def _sigmas(scheduler, num_steps, mu, stochastic):
    return shifted_sigmas(num_steps, mu)


def _prompt_shapes(config, max_sequence_length):
    shapes = SD3.prompt_shapes(config, max_sequence_length)
    return shapes | {"mask": shapes["embeddings"][:1]}


TOY = replace(
    SD3,
    lora_layers=("attn.to_q", "attn.to_v"),
    velocity=_velocity,
    encode=_encode,
    mu=_mu,
    sigmas=_sigmas,
    prompt_shapes=_prompt_shapes,
    comfyui=lambda module: None,
)
