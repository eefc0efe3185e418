"""A Gaussian: the energy whose samplers are known in closed form."""

import torch
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy, log_normal, normal


class Gaussian(Energy):
    """N(mean, variance I), normalised.

    Args:
        dimension: at least 1.
        mean: mean of every coordinate.
        variance: variance of every coordinate, positive.
    """

    log_z = 0.0

    def __init__(self, dimension: int = 2, mean: float = 1.0, variance: float = 0.25) -> None:
        self.dimension, self.mean, self.variance = dimension, mean, variance
        self.spread, self.width = (mean**2 + variance) ** 0.5, variance**0.5

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        return -log_normal(x, self.mean, self.variance)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """See `Energy.sample`."""
        return self.mean + self.variance**0.5 * normal(generator, number, self.dimension)
