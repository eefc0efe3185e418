"""Network calls of a method, counted: the method runs for some periods around fields of one dimension.

What it keeps follows from the rows counted and the shape of a real latent.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from am_diffusers.config import Config
from am_diffusers.methods import METHODS, Method
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.noise import LatentSpec, generator_for, generators_for
from am_diffusers.run.fields import sizes, with_guidance
from am_diffusers.system.resolution import Resolution
from am_diffusers.transitions import uniform_sigmas
from am_diffusers.velocity import Conditioning, Pull

PERIODS = 64
"""Periods that calls are averaged over: some methods draw which steps they train."""


@dataclass(frozen=True)
class Counted:
    """Cost of an iteration of a method.

    Attributes:
        calls: transformer calls of one sample in an iteration by kind, means over iterations; a guided
            velocity counts as its two calls, its vector-Jacobian product as three.
        rows: rows that one sample is trained on in an iteration, before masking.
        period: iterations from one rollout to the next.
        method: the method, made around fields of one dimension.
    """

    calls: dict[str, float]
    rows: int
    period: int
    method: Method


class CountedField:
    """A velocity of zero that counts its calls, one a row."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self._name, self._counts = name, counts

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return zero; with gradient it is a call of the loss."""
        self._count("forward and backward of the loss" if torch.is_grad_enabled() else "forward", x)
        return torch.zeros_like(x)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return zero and a pull-back to zero, see `VelocityField.vjp`."""
        self._count("forward and backward", x)
        return torch.zeros_like(x), torch.zeros_like

    def _count(self, kind: str, x: Tensor) -> None:
        self._counts[f"{self._name}, {kind}"] += len(x)


def even(num_steps: int, noisy: bool) -> Tensor:
    """Return even noise levels (num_steps + 1,), which a method does with like with those of a model."""
    return uniform_sigmas(num_steps)


def count(config: Config, sigmas: Callable[[int, bool], Tensor] = even) -> Counted:
    """Run the method of a config for `PERIODS` periods on one group of samples that share a prompt.

    Args:
        config: the config.
        sigmas: the noise levels, see `Surroundings`.

    Raises:
        ValueError: if its flags don't go together, or the levels are unfit for the method.
    """
    counts, group = Counter[str](), config.shared.samples_per_prompt
    shared = replace(config.shared, mask_quantile=None, divergence="kl", reward_scale=1.0, target_kl=None)
    cond = Conditioning(("",) * group, negative_embeddings=torch.zeros(group, 1, 1))
    fields = with_guidance(config, CountedField("policy", counts), CountedField("base", counts))
    with tempfile.TemporaryDirectory() as folder:
        around = Surroundings(
            *fields[:2],
            reward=lambda latents, prompts: latents.sum(1),
            latents=LatentSpec((1,)),
            sigmas=cache(sigmas),
            rollout=fields.rollout,
            encode=lambda prompts: cond.index([0] * len(prompts)),
            sizes=replace(sizes(config), rollout=None, reward=None, offload=False),
            folder=Path(folder),
        )
        method = METHODS[config.method.method](around, shared, config.settings)
        iterations = PERIODS * method.period
        rows = [_iterate(method, cond, iteration) for iteration in range(iterations)]
    calls = {kind: number / (iterations * group) for kind, number in sorted(counts.items())}
    return Counted(calls, rows[0] // group, method.period, method)


def described_latents(source: Pretrained, size: Resolution) -> LatentSpec:
    """Return the shape of a latent, from configuration files alone."""
    return LatentSpec(source.family.latent_shape(source.config_of, size.height, size.width))


def _iterate(method: Method, cond: Conditioning, iteration: int) -> int:
    """Collect and take the loss; return the number of rows."""
    generators = generators_for(0, iteration, range(len(cond)))
    examples = method.collect(cond, generators, generator_for(0, iteration, "shared")).examples
    with torch.enable_grad():
        method.loss(examples)
    return len(examples)
