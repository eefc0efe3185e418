"""Learned initial noise for deterministic samplers: a Brownian stage before the noise (arXiv 2605.06583).

A field q over (x, stage time u in [0, 1]) steers a Brownian motion from 0, whose end is the sampler's noise:

    dX = q(X, u) du + dW,   X_0 = 0,   noise = X_1        (q = 0: standard normal noise)
    loss = |q(X_u, u) + a_0|^2,   X_u ~ N(u X_1, u (1 - u) I) given X_1

with a_0 the adjoint at sigma = 1 of the trajectory from X_1: the gradient of its cost to go V in the noise.
This is reciprocal.py with nu = 1, the source 0 and the time u = 1 - s^2; as V tilts the free end's own law,
N(0, I), there is no corrector. The optimum draws noise from nu*(x) ~ N(x; 0, I) exp(-V(x)).

What that gives. With the base's ODE as it is, V = -reward_scale * reward(end), and the ends of the ODE from
nu* have the tilted law of its ends, exactly: the only unbiased use of a deterministic sampler here. With the
control of deterministic Adjoint Matching on top, the ends are *not* tilted either: on N(m, S^2) with reward
g x they have mean m + (S^2 + S pi / 2) * reward_scale * g, the tilt and the proximal step added up. Under a
memoryless table V is constant and there is nothing to learn.

Mathematics for a field of the caller's own. It isn't offered for Stable Diffusion 3: the transformer knows no
time before sigma = 1, and a second network to steer noise isn't part of a LoRA.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.parts.surroundings import Gather, gather_from_one
from am_diffusers.noise import draw
from am_diffusers.reciprocal import brownian, reciprocal_rows, steer
from am_diffusers.transitions import uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning, VelocityField


@torch.no_grad()
def sample_noise(
    stage: VelocityField,
    cond: Conditioning,
    first: Tensor,
    num_steps: int,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Initial noise X_1 by `num_steps` Euler-Maruyama steps of the stage, (B, ...).

    Args:
        stage: q, a field over (x, stage time); called `num_steps` times.
        cond: conditioning, B rows.
        first: X_0, zeros of the latents' shape, (B, ...).
        num_steps: at least 1.
        step_noise: standard normal noise of step k, like `first`.
    """

    def control(x: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
        return stage(x, 1 - level.square(), cond)

    table = brownian(uniform_sigmas(num_steps).sqrt(), nu=1.0)
    return steer(CallableField(control), table, cond, first, step_noise).end


def stage_rows(
    noise: Tensor,
    adjoint: Tensor,
    cond: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    gather: Gather = gather_from_one,
) -> MatchingBatch:
    """One row a sample of the stage's regression, for `matching.matching_loss(stage, rows)`.

    Losses of all ranks add up to a mean over the samples of all.

    Args:
        noise: X_1 that trajectories started from, (B, ...).
        adjoint: a_0, gradient of the cost to go at `noise`, (B, ...).
        cond: conditioning, B rows.
        generators: one CPU generator a sample; a time, uniform in [0, 1), and a bridge's noise are drawn.
        gather: concatenates a 1-D tensor over ranks; a single process by default.
    """
    times = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    bridge = draw(generators, noise.shape[1:], noise.dtype).to(noise.device)
    origin, levels = torch.zeros_like(noise), (1 - times).sqrt()
    rows = reciprocal_rows(origin, noise, adjoint, levels, 1.0, bridge, cond)
    ones = noise.new_ones(len(noise))
    return replace(rows, sigmas=times.to(noise), weight=ones / len(gather(ones)))
