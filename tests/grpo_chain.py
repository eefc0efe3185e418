"""Flow-GRPO on a short 1-D chain: a Gaussian law, a policy with a shift at each step, and rows of it."""

import torch

from am_diffusers.noise import LatentSpec, generator_for, generators_for
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning
from methods_around import make_method
from oracles import gaussian

K = 5
LAW = gaussian(0.3, 0.5)
TABLE = memoryless_local_linear(uniform_sigmas(K))
LATENTS = LatentSpec((1,), dtype=torch.float64)
BASE = LAW.field()


def reward(x, prompts):
    return 0.7 * x[:, 0]


def quadratic(x, prompts):
    return -((x[:, 0] - 1) ** 2)


def some_shifts():
    return torch.tensor([0.3, -0.2, 0.1, -0.4, 0.0], dtype=torch.float64, requires_grad=True)


def shifted(shifts):
    """The base's velocity plus a number of its own at each step."""

    def velocity(x, sigma, cond):
        return LAW.velocity(x, sigma) + shifts[torch.searchsorted(-TABLE.sigmas, -sigma)][:, None]

    return CallableField(velocity)


def make(policy, base=BASE, **given):
    """Rewards of groups of 4 are compared; 5 steps, reward scale 2."""
    plain = {"reward": quadratic, "latents": LATENTS, "samples_per_prompt": 4, "num_inference_steps": K}
    return make_method("flow_grpo", policy, base, **(plain | given))


def collect(method, num=8, iteration=0, first=0, group=4):
    ids = range(first, first + num)
    prompts = tuple(f"prompt {i // group}" for i in ids)
    pooled = torch.tensor([[float(i)] for i in ids])
    cond = Conditioning(prompts, pooled=pooled)
    return method.collect(cond, generators_for(0, iteration, ids), generator_for(0, iteration, "shared"))


def total_loss(method, collected, size=1000):
    parts = [method.loss(part) for part in collected.examples.split(size)]
    return sum(loss for loss, _ in parts), {name: sum(p[1][name] for p in parts) for name in parts[0][1]}


def gradient(method, shifts, collected, size=1000):
    (found,) = torch.autograd.grad(total_loss(method, collected, size)[0], shifts)
    return found
