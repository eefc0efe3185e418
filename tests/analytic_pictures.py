"""Pictures of fields in closed form, for the tests of scores, grids and validation."""

import torch

from am_diffusers.evaluation.images import Sampler
from am_diffusers.evaluation.pairs import Scorer
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import TableSolver
from am_diffusers.transitions import ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning

PROMPTS = ["dark", "bright", "a third prompt"]


def encode(prompts):
    levels = torch.tensor([[len(prompt) / 10] for prompt in prompts])
    return Conditioning(tuple(prompts), pooled=levels)


def field(shift):
    """Straight to 0.5 + `shift`, plus a little of the prompt and of the noise that `shift` doesn't change."""

    def velocity(x, sigma, cond):
        level = sigma.view(-1, 1, 1, 1)
        middle = 0.5 + shift + 0.02 * cond.pooled.view(-1, 1, 1, 1)
        noise = (x - (1 - level) * middle) / level
        return (x - middle - 0.05 * noise.tanh()) / level

    return CallableField(velocity)


def make_sampler(batch_size=4, seed=3):
    return Sampler(
        TableSolver(ode_euler(uniform_sigmas(5))),
        encode=encode,
        decode=lambda latents: latents.clamp(0, 1),
        latents=LatentSpec((3, 40, 40)),
        seed=seed,
        batch_size=batch_size,
    )


def make_scorer(batch_size, rewards, features=None, shift=0.1):
    return Scorer(make_sampler(batch_size), field(0.0), field(shift), rewards, features)
