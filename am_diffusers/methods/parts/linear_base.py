"""Adjoint Matching with a linear base, without trajectories: its formulas (arXiv 2605.11480).

The base is the reverse SDE of Gaussian data N(0, variance * I), memoryless and linear, so that its adjoint
is known in closed form. With s = sigma, t = 1 - s, m(s) = variance * t^2 + s^2, and a state x_e at the noise
level s_e < s (s_e = 0: a clean image) whose tilted law is p_e(x_e) exp(reward_scale * V(x_e)):

    x_s    = (t / t_e) x_e + sqrt(s^2 - (t / t_e)^2 s_e^2) * fresh noise
    target = velocity_lin(x_s, s) - (s m_e / (t_e m)) [ x_e / m_e + score_e(x_e) + reward_scale grad V(x_e) ]
    velocity_lin(x, s) = x (s - variance * t) / m

The mean of the target given x_s, x_e drawn from the tilted law, is that law's velocity, for every variance
> 0: the linear velocity and the posterior mean of x_e are two estimates of it (Tweedie's and the target
score identity), weighted by what the Gaussian says they are worth.

Reconstruction of that paper from its abstract's idea, a linear base drift
and a modified terminal cost; the identity is tested, the constants needn't be the paper's.
"""

import torch
from torch import Tensor

from am_diffusers.parametrization import score_from_velocity


def later_state(start: Tensor, start_sigma: float, sigma: Tensor, noise: Tensor) -> Tensor:
    """Noisier states x_s of `start`, (N, ...).

    Args:
        start: x_e, (N, ...).
        start_sigma: noise level of those states s_e, in [0, 1).
        sigma: noise levels in [s_e, 1], (N,).
        noise: standard normal, (N, ...).
    """
    ratio = (1 - sigma) / (1 - start_sigma)
    std = (sigma**2 - (ratio * start_sigma) ** 2).clamp(min=0).sqrt()
    return _like(ratio, start) * start + _like(std, start) * noise


def linear_target(
    x: Tensor,
    sigma: Tensor,
    start: Tensor,
    start_sigma: float,
    *,
    score: Tensor,
    adjoint: Tensor,
    variance: float,
) -> Tensor:
    """Velocity that the policy should have at `x` given the state it was noised from, (N, ...).

    Args:
        x: `later_state` of `start`, (N, ...).
        sigma: noise level, noise levels in (s_e, 1], (N,).
        start: x_e, (N, ...).
        start_sigma: noise level, noise level s_e, in [0, 1).
        score: score of the base's law at x_e, (N, ...).
        adjoint: -reward_scale * grad V(x_e), (N, ...).
        variance: variance of the Gaussian data behind the linear base, > 0.
    """
    t, t_e = 1 - sigma, 1 - start_sigma
    m, m_e = variance * t**2 + sigma**2, variance * t_e**2 + start_sigma**2
    linear = _like((sigma - variance * t) / m, x) * x
    return linear - _like(sigma / (t_e * m), x) * (start + m_e * (score - adjoint))


def renoised_score(x: Tensor, sigma: float, velocity: Tensor) -> Tensor:
    """Score of clean data seen through a little noise, (B, ...): (1 - sigma) * score of the law at `x`.

    E[score of the data | x_sigma] is exactly that; without the factor the error is of first order in sigma
    (about 10 % at .1 on data of variance 1), with it of second (1 %).

    Args:
        x: the data noised to `sigma`, (B, ...).
        sigma: in (0, 1), small.
        velocity: the base's at `x`, (B, ...).
    """
    return (1 - sigma) * score_from_velocity(x, sigma, velocity)


def capped_weight(sigma: Tensor, cap: float) -> Tensor:
    """Adjoint Matching's weight of velocity errors at `sigma` > 0, 2 (1 - s) / s, but at most `cap`."""
    return (2 * (1 - sigma) / sigma).clamp(max=cap)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Values (N,) shaped to broadcast against `x` (N, ...), in its dtype."""
    return values.to(x).reshape(-1, *[1] * (x.ndim - 1))


def stratified_sigmas(num: int, lowest: float, generator: torch.Generator) -> Tensor:
    """Noise levels (num,) float64, one uniform in each of `num` equal parts of (lowest, 1], from 1 down."""
    part = torch.arange(num, dtype=torch.float64)
    place = (part + torch.rand(num, generator=generator, dtype=torch.float64)) / num
    return 1 - (1 - lowest) * place
