"""Training by a method and a torch optimizer, and policies whose law is known."""

import math

import torch

from am_diffusers.noise import generator_for, generators_for
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import CallableField
from oracles import Mixture, affine, unconditional


def train(method, parameters, *, num_samples, iterations, lr):
    """Trains by the real method and Adam with a cosine schedule; mean rewards by iteration."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    rewards = []
    for iteration in range(iterations):
        generators = generators_for(0, iteration, range(num_samples))
        shared = generator_for(0, iteration, "shared")
        collected = method.collect(unconditional(num_samples), generators, shared)
        rewards.append(collected.metrics.get("reward", math.nan))
        optimizer.zero_grad()
        for part in collected.examples.split(20_000):
            method.loss(part)[0].backward()
        optimizer.step()
        lr_schedule.step()
    return rewards


def linear_policy(law: Mixture, table: Transitions):
    """Base velocity plus a_k x + b_k at each node of the grid, zero at first."""
    weights = torch.zeros(table.num_steps, 2, dtype=torch.float64, requires_grad=True)

    def velocity(x, sigma, cond):
        a, b = weights[torch.searchsorted(-table.sigmas, -sigma)].split(1, dim=1)
        return law.velocity(x, sigma) + a * x + b

    return CallableField(velocity), weights


def end_moments(table: Transitions, policy, base) -> tuple[float, float]:
    """Mean and std of x_K for fields affine in x, the last step with the base: no Monte Carlo."""
    mean, variance = 0.0, 1.0
    for k, sigma in enumerate(table.sigmas[:-1].tolist()):
        slope, intercept = affine(policy if k < table.num_steps - 1 else base, sigma)
        factor = (table.x_coef[k] + table.v_coef[k] * slope).item()
        mean = factor * mean + table.v_coef[k].item() * intercept
        variance = factor**2 * variance + table.std[k].item() ** 2
    return mean, variance**0.5
