"""Neal's funnel: one coordinate sets the width of all others."""

import torch
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy, log_normal, normal

DEVIATION = 3.0


class Funnel(Energy):
    """x_1 ~ N(0, 9), the others N(0, exp(x_1)) given it; normalised.

    Args:
        dimension: at least 2.

    Raises:
        ValueError: on another dimension.
    """

    log_z, spread, width = 0.0, 3.0, 0.3

    def __init__(self, dimension: int = 10) -> None:
        if dimension < 2:
            raise ValueError(f"funnel has at least 2 dimensions, got {dimension}")
        self.dimension = dimension

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        first, others = x[:, :1], x[:, 1:]
        scaled = log_normal(others * (-0.5 * first).exp(), 0.0, 1.0) - 0.5 * others.shape[1] * first[:, 0]
        return -log_normal(first, 0.0, DEVIATION**2) - scaled

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """See `Energy.sample`."""
        first = DEVIATION * normal(generator, number, 1)
        return torch.cat([first, (0.5 * first).exp() * normal(generator, number, self.dimension - 1)], 1)
