"""Noise of the tilted law of a frozen sampler's ends, without training.

    nu*(x) ~ N(x; 0, I) exp(reward_scale * reward(G(x)))

for a deterministic sampler G: the ends of G from nu* have exactly the law of its ends times
exp(reward_scale * reward) (Tang, arXiv 2403.06279). It is sampled by preconditioned Crank-Nicolson Langevin
steps (Cotter et al., arXiv 1202.0709), whose acceptance doesn't fall with the dimension: with g the gradient
of the reward, lambda = reward_scale and delta the step,

    y = ((2 - delta) x + 2 delta lambda g(x) + sqrt(8 delta) xi) / (2 + delta)
    rho(a, b) = -lambda r(a) - lambda/2 <b - a, g(a)>
                - delta lambda/4 <a + b, g(a)> + delta lambda^2/4 |g(a)|^2

accepted with probability min(1, exp(rho(x, y) - rho(y, x))). Any field g leaves nu* invariant, also an
inexact gradient. Self-normalised importance sampling of normal noises tells the same where reward_scale is
moderate.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from am_diffusers.evaluation.statistics import Array
from am_diffusers.noise import draw

TARGET_ACCEPTANCE = 0.6
"""Near the optimum of Langevin proposals, .574 (Roberts & Rosenthal 1998)."""
LARGEST_STEP = 2.0

RewardAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Noise (C, ...) to rewards (C,) and their gradients (C, ...)."""


class Sampled(NamedTuple):
    """C chains after their burn-in.

    Attributes:
        noise: every `thin`-th state, (S, C, ...).
        kept: rewards at these states, (S, C).
        rewards: at all T states, (T, C).
        accepted: share of proposals that were accepted.
        delta: step that was used.
    """

    noise: Tensor
    kept: Tensor
    rewards: Tensor
    accepted: float
    delta: float


class State(NamedTuple):
    """State of C chains: noise (C, ...), rewards (C,), gradients of the rewards (C, ...)."""

    noise: Tensor
    rewards: Tensor
    gradient: Tensor


def propose(state: State, reward_scale: float, delta: float, xi: Tensor) -> Tensor:
    """Return the proposal from a state with standard normal `xi`, (C, ...)."""
    drift = 2 * delta * reward_scale * state.gradient
    return ((2 - delta) * state.noise + drift + (8 * delta) ** 0.5 * xi) / (2 + delta)


def log_acceptance(here: State, there: State, reward_scale: float, delta: float) -> Tensor:
    """Return the logarithm of the ratio that a proposal is accepted with, float64, (C,)."""

    def rho(a: State, b: State) -> Tensor:
        x, y, g = (value.double().flatten(1) for value in (a.noise, b.noise, a.gradient))
        inner = 0.5 * ((y - x) * g).sum(1) + 0.25 * delta * ((x + y) * g).sum(1)
        squared = 0.25 * delta * reward_scale**2 * g.square().sum(1)
        return -reward_scale * (a.rewards.double() + inner) + squared

    return rho(here, there) - rho(there, here)


def sample_noise(
    evaluate: RewardAndGradient,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    *,
    reward_scale: float,
    steps: int,
    burn_in: int,
    thin: int = 1,
    delta: float = 0.1,
) -> Sampled:
    """Run C chains; the step adapts during the burn-in and stays from then on.

    Args:
        evaluate: reward of the sampler's end and its gradient; called burn_in + steps + 1 times.
        noise: where the chains start, (C, ...).
        generators: one for each chain.
        reward_scale: lambda, >= 0.
        steps: states after the burn-in, T.
        burn_in: steps that are thrown away.
        thin: keep every `thin`-th state.
        delta: first step, in (0, 2].

    Raises:
        NonFiniteError: if a reward or a gradient is not finite.
    """
    state, taken, kept, rewards = State(noise, *evaluate(noise)), 0.0, list[State](), list[Tensor]()
    for i in range(burn_in + steps):
        xi = draw(generators, noise.shape[1:], noise.dtype).to(noise.device)
        proposal = propose(state, reward_scale, delta, xi)
        there = State(proposal, *evaluate(proposal))
        log_ratio = log_acceptance(state, there, reward_scale, delta)
        chance = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        accept = chance.to(log_ratio.device).log() < log_ratio
        rows = accept.view(-1, *[1] * (noise.ndim - 1))
        state = State(
            torch.where(rows, there.noise, state.noise),
            torch.where(accept, there.rewards, state.rewards),
            torch.where(rows, there.gradient, state.gradient),
        )
        probability = log_ratio.clamp(max=0).exp().mean().item()
        if i < burn_in:
            delta = min(
                LARGEST_STEP, delta * float(np.exp((probability - TARGET_ACCEPTANCE) / (i + 1) ** 0.5))
            )
            continue
        taken += accept.double().mean().item() / steps
        rewards.append(state.rewards)
        if (i - burn_in + 1) % thin == 0:
            kept.append(state)
    return Sampled(
        torch.stack([each.noise for each in kept]),
        torch.stack([each.rewards for each in kept]),
        torch.stack(rewards),
        taken,
        delta,
    )


class Weighted(NamedTuple):
    """The tilt as base samples tell it.

    Attributes:
        weights: exp(reward_scale * reward), normalised, (N,).
        mean: mean reward under the tilt.
        standard_error: standard error of `mean`, by the delta method.
        share: effective share of the samples, in (0, 1].
    """

    weights: Array
    mean: float
    standard_error: float
    share: float


def importance(rewards: Array, reward_scale: float) -> Weighted:
    """Return the tilt of N base samples by self-normalised importance sampling."""
    weights = softmax(reward_scale * rewards)
    mean = float(weights @ rewards)
    error = float(np.sqrt(np.square(weights) @ np.square(rewards - mean)))
    return Weighted(weights, mean, error, float(1 / (len(rewards) * np.square(weights).sum())))
