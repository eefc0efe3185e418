"""Training a control in closed-form surroundings: a small network on top of the base's velocity.

    velocity_policy(x) = velocity_base(x) + network(x, clean estimate of the base, sigma)

The network is zero at first, and the same for all methods. Adam; its learning rate falls to 0 like a cosine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from am_diffusers.methods import Method
from am_diffusers.noise import generator_for, generators_for
from am_diffusers.parametrization import clean_from_velocity
from am_diffusers.rollout import sample_ode
from am_diffusers.transitions import uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning
from benching.oracles.laws import conditioning
from benching.oracles.mixture import Mixture
from benching.oracles.problems import Problem

WIDTH, WAVES, BETAS = 48, (3, 6), (0.9, 0.99)
LOOK_SAMPLES, LOOK_STEPS = 4000, 20
"""Samples and steps of the mean reward, where training ends by it."""


@dataclass(frozen=True)
class Schedule:
    """Length and speed of a training.

    Attributes:
        iterations: optimizer steps.
        batch: samples per iteration.
        learning_rate: learning rate of the first iteration.
        until_reward: end once the mean reward of the policy's ODE is the tilt's, with a constant
            learning rate: for methods that nothing else stops.
        from_tilt: begin at the tilt's own velocity instead of the base's, to tell a method that leaves the
            tilt from one that is slow to come near it.
    """

    iterations: int = 300
    batch: int = 64
    learning_rate: float = 0.01
    until_reward: bool = False
    from_tilt: bool = False


def describe() -> dict[str, Any]:
    """Return everything that training depends on beside method and schedule, for JSON."""
    return {
        "width": WIDTH,
        "waves": list(WAVES),
        "betas": list(BETAS),
        "look": [LOOK_SAMPLES, LOOK_STEPS],
    }


def control(law: Mixture, seed: int) -> tuple[CallableField, list[Tensor]]:
    """Return the velocity of a law plus a network that is zero at first, and the network's parameters."""
    dim, generator = law.means.shape[1], generator_for("control", seed)
    sizes = [2 * dim + 1 + 2 * len(WAVES), WIDTH, WIDTH, dim]
    layers = [torch.nn.Linear(*pair, dtype=torch.float64) for pair in pairwise(sizes)]
    for layer in layers:
        torch.nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(layers[-1].weight)
    network = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    def velocity(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        base, s = law.velocity(x, sigma), sigma[:, None]
        waves = [wave(c * s) for c in WAVES for wave in (torch.sin, torch.cos)]
        return base + network(torch.cat([x, clean_from_velocity(x, sigma, base), s, *waves], 1))

    return CallableField(velocity), list(network.parameters())


def train(
    method: Method, parameters: list[Tensor], schedule: Schedule, *, seed: int, done: Callable[[], bool]
) -> int:
    """Train by the method's own examples and losses; return the number of iterations made.

    Args:
        method: method, made around the field that `parameters` belong to.
        parameters: trained parameters.
        schedule: length and speed.
        seed: seed of the training noise.
        done: tells if training should end, asked before each iteration if the schedule says so.
    """
    optimizer = torch.optim.Adam(parameters, schedule.learning_rate, betas=BETAS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.iterations)
    cond = Conditioning(("the prompt",) * schedule.batch)
    for iteration in range(schedule.iterations):
        if schedule.until_reward and done():
            return iteration
        generators = generators_for(seed, iteration, range(schedule.batch))
        collected = method.collect(cond, generators, generator_for(seed, iteration, "shared"))
        optimizer.zero_grad()
        loss, _ = method.loss(collected.examples)
        loss.backward()
        optimizer.step()
        if not schedule.until_reward:
            cosine.step()
    return schedule.iterations


def reaches(field: CallableField, problem: Problem) -> Callable[[], bool]:
    """Return a function that tells if the field's ODE makes points of at least the tilt's mean reward."""
    aim, generator = problem.mean_reward(problem.tilt()), generator_for("look")
    noise = torch.randn(LOOK_SAMPLES, problem.dim, generator=generator, dtype=torch.float64)

    def reached() -> bool:
        x = sample_ode(field, uniform_sigmas(LOOK_STEPS), conditioning(LOOK_SAMPLES), noise)
        return problem.reward(x).mean().item() >= aim

    return reached
