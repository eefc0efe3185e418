"""Many wells: a product of double wells; MW-5 has five coordinates and 32 modes of equal mass."""

import math

import torch
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy

SEPARATION = 4.0


class ManyWell(Energy):
    """The sum of (x_i^2 - 4)^2 over the coordinates, wells at -2 and 2 of each.

    Args:
        dimension: from 1 to 16; there are 2 ** dimension modes.

    Raises:
        ValueError: on another dimension.
    """

    spread, width = 2.0, 32**-0.5

    def __init__(self, dimension: int = 5) -> None:
        if not 1 <= dimension <= 16:
            raise ValueError(f"many_well has from 1 to 16 dimensions, 2 modes each, got {dimension}")
        self.dimension = dimension
        grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
        density = (-(grid.square() - SEPARATION).square()).exp()
        cumulated = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, grid)])
        self._grid, self._cumulated = grid, cumulated / cumulated[-1]
        self.log_z = dimension * math.log(cumulated[-1].item())
        self.mode_masses = torch.full((2**dimension,), 0.5**dimension, dtype=torch.float64)

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        return (x.square() - SEPARATION).square().sum(1)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """See `Energy.sample`: each coordinate by its distribution function, on a fine grid."""
        u = torch.rand(number, self.dimension, generator=generator, dtype=torch.float64)
        right = torch.searchsorted(self._cumulated, u).clamp(1, len(self._grid) - 1)
        low, high = self._cumulated[right - 1], self._cumulated[right]
        step = self._grid[1] - self._grid[0]
        return self._grid[right - 1] + step * (u - low) / (high - low).clamp(min=1e-300)

    def modes(self, x: Tensor) -> Tensor:
        """See `Energy.modes`: the signs of the coordinates as a binary number."""
        return ((x > 0).long() * 2 ** torch.arange(self.dimension)).sum(1)
