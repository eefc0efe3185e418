"""Derivatives by autograd that the equations of docs/theory.md are made of, in the clock t = 1 - sigma."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from oracles import Mixture

Function = Callable[[Tensor, Tensor], Tensor]
SIGMAS = torch.linspace(0.08, 0.92, 43, dtype=torch.float64)


class Derivatives(NamedTuple):
    """Of f (B,) at x (B, D): gradient (B, D), Laplacian (B,) and d f / dt = -d f / d sigma (B,)."""

    gradient: Tensor
    laplacian: Tensor
    by_t: Tensor


def derivatives(function: Function, x: Tensor, sigma: Tensor) -> Derivatives:
    x, sigma = (value.detach().clone().requires_grad_(True) for value in (x, sigma))
    gradient, by_sigma = torch.autograd.grad(function(x, sigma).sum(), (x, sigma), create_graph=True)
    laplacian = divergence_of(gradient, x)
    return Derivatives(gradient.detach(), laplacian, -by_sigma.detach())


def divergence(field: Function, x: Tensor, sigma: Tensor) -> Tensor:
    """Sum over i of d field_i / d x_i, (B,)."""
    x = x.detach().clone().requires_grad_(True)
    return divergence_of(field(x, sigma), x)


def divergence_of(values: Tensor, x: Tensor) -> Tensor:
    parts = [
        torch.autograd.grad(values[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])
    ]
    return torch.stack(parts, 1).sum(1).detach()


def memoryless(sigma: Tensor) -> Tensor:
    """The memoryless schedule of eta."""
    return sigma / (1 - sigma)


def drift(law: Mixture, eta: Callable[[Tensor], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """-velocity + eta * score: drift in t of the SDE with noise sqrt(2 eta) that samples `law`, (B, D)."""
    s, velocity = sigma[:, None], law.velocity(x, sigma)
    return -velocity - eta(s) * (x + (1 - s) * velocity) / s


def states(law: Mixture, sigma: Tensor, seed: int = 0) -> Tensor:
    """One state of the noisy law of `law` at each noise level, (B, D)."""
    generator = torch.Generator().manual_seed(seed)
    num, dim = len(sigma), law.means.shape[1]
    noises = torch.randn(2, num, dim, generator=generator, dtype=torch.float64)
    which = torch.multinomial(law.weights, num, replacement=True, generator=generator)
    clean = law.means[which] + law.variances[which, None].sqrt() * noises[0]
    return (1 - sigma[:, None]) * clean + sigma[:, None] * noises[1]
