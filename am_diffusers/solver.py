"""Solvers: what carries noise to final latents when pictures are made.

A table of `transitions.py` is one; schedulers of Diffusers are others (models/schedulers.py). Stochastic ones
draw the noise of their steps from one generator a row, so that neither batch size nor the number of processes
changes it and two models get the same. The path KL of a stochastic table is

    sum over steps k of KL(policy's step k || base's step k) at the policy's own states,

whose expectation over the policy's noise is the KL divergence of its trajectories from those of the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from am_diffusers.rollout import draw, noise_level, sample
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


class Solution(NamedTuple):
    """Final latents (B, ...), and their path KL (B,) in nats, float64 on the CPU, where it was taken."""

    latents: Tensor
    path_kl: Tensor | None


class Solver(Protocol):
    """Noise to final latents, by a velocity field."""

    def __call__(
        self,
        field: VelocityField,
        cond: Conditioning,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        *,
        base: VelocityField | None = None,
    ) -> Solution:
        """Latents that `field` makes of `noise`.

        Args:
            field: what is followed, with its guidance.
            cond: conditioning, B rows.
            noise: starting noise, (B, ...).
            generators: B, of the noise of the steps; a deterministic solver leaves them alone.
            base: take the path KL against this field, with the same guidance: one more call of it for each
                stochastic step. A solver without transition densities takes none.
        """
        ...


@dataclass(frozen=True)
class TableSolver:
    """The steps of a table, deterministic or stochastic."""

    transitions: Transitions

    @torch.no_grad()
    def __call__(
        self,
        field: VelocityField,
        cond: Conditioning,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        *,
        base: VelocityField | None = None,
    ) -> Solution:
        """See `Solver`: K calls of `field`; path KL of stochastic tables only."""
        table, terms = self.transitions, list[Tensor]()

        def compare(k: int, x: Tensor, velocity: Tensor) -> None:
            if base is not None and table.std[k] > 0:
                terms.append(table.path_kl(k, velocity, base(x, noise_level(table, k, x), cond)))

        def step_noise(_: int) -> Tensor:
            return draw(generators, noise.shape[1:], noise.dtype).to(noise.device)

        latents = sample(field, table, cond, noise, step_noise, watch=compare)
        return Solution(latents, torch.stack(terms).cpu().double().sum(0) if terms else None)
