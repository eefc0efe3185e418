"""Gradients of an energy, clipped by norm and counted."""

import math

import torch
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy
from am_diffusers.system.failures import NonFiniteError


def clip_norm(gradient: Tensor, limit: float) -> Tensor:
    """Scale rows (B, D) of a norm above `limit` to it; differentiable."""
    if math.isinf(limit):
        return gradient  # the factor's derivative would be infinite times 0
    norm = gradient.double().norm(dim=1, keepdim=True).clamp(min=1e-30)
    return gradient * (limit / norm).clamp(max=1).to(gradient.dtype)


class Gradients:
    """Values and clipped gradients of an energy.

    Args:
        energy: whose.
        limit: largest norm of a gradient; infinite = as it is.

    Attributes:
        calls: energies evaluated so far, with their gradient or without, one a state.
    """

    def __init__(self, energy: Energy, limit: float = float("inf")) -> None:
        self.energy, self.limit, self.calls = energy, limit, 0

    def values(self, x: Tensor) -> Tensor:
        """Energies of states (B, D) without gradient, (B,).

        Raises:
            NonFiniteError: if one isn't finite.
        """
        self.calls += len(x)
        with torch.no_grad():
            return _finite(self.energy.energy(x), x)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,) and clipped gradients (B, D) of states (B, D), detached.

        Raises:
            NonFiniteError: if an energy or a gradient isn't finite.
        """
        _, value, gradient = self.differentiable(x, create_graph=False)
        return value.detach(), gradient

    def differentiable(self, x: Tensor, *, create_graph: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """States as a leaf of a graph, their energies, and clipped gradients that are part of the graph.

        Raises:
            NonFiniteError: if an energy or a gradient isn't finite.
        """
        self.calls += len(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = _finite(self.energy.energy(x), x)
            (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph)
            _finite(gradient, x)
            return x, value, clip_norm(gradient, self.limit)


def _finite(values: Tensor, x: Tensor) -> Tensor:
    if not values.isfinite().all():
        row = int((~values.isfinite()).reshape(len(x), -1).any(1).nonzero()[0])
        raise NonFiniteError(
            f"the energy or its gradient isn't finite at {[round(v, 3) for v in x[row].tolist()[:8]]}: "
            "is the energy finite everywhere? Lower --learning_rate or --clip"
        )
    return values
