"""Energies: laws known up to their constant, exp(-energy(x)) / Z."""

import math

import torch
from torch import Tensor


class Energy:
    """A law known by its energy; a class of your own derives from this and has `dimension` and `energy`.

    Without `spread` and `width` they are taken as 1. What is known besides is measured in the report.

    Attributes:
        dimension: number of coordinates of a state.
        spread: standard deviation of a coordinate, roughly: how far paths must reach.
        width: standard deviation of the narrowest mode, roughly: how fine they must end.
        log_z: log of the integral of exp(-energy), None if unknown.
        mode_masses: masses of the modes that `modes` tells apart, (M,), None if unknown.
    """

    dimension: int
    spread: float = 1.0
    width: float = 1.0
    log_z: float | None = None
    mode_masses: Tensor | None = None

    def energy(self, x: Tensor) -> Tensor:
        """Energy of states (B, dimension), differentiable twice, in their dtype, (B,)."""
        raise NotImplementedError

    def sample(self, number: int, generator: torch.Generator) -> Tensor | None:
        """Draw exact samples, (number, dimension) float64; None if there is no way to."""
        return None

    def modes(self, x: Tensor) -> Tensor | None:
        """Tell which mode each state (B, dimension) is in, (B,) int64; None if unknown."""
        return None


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_normal(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
    """Log density of N(mean, variance I), summed over the last dimension."""
    squared = (x - mean).square().sum(-1) / variance
    return -0.5 * (squared + x.shape[-1] * math.log(2 * math.pi * variance))


def nearest_point(x: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest of `points` (M, D) to each state (B, D), (B,)."""
    return torch.stack([(x - point).square().sum(1) for point in points.to(x)]).argmin(0)
