"""A mixture of Student-t laws: heavy tails in many dimensions."""

import math

import torch
from torch import Tensor

from am_diffusers.noise import generator_for
from am_diffusers.samplers.energies.base import Energy, nearest_point, normal

NUM_MODES, REACH, FREEDOM = 10, 10.0, 2.0


class StudentMixture(Energy):
    """Ten products of Student-t laws of 2 degrees of freedom, of equal mass; normalised.

    Means are uniform in [-10, 10]^dimension, always the same; the variance is infinite.

    Args:
        dimension: at least 1.
    """

    log_z, width = 0.0, 1.0
    spread = REACH / 3**0.5

    def __init__(self, dimension: int = 50) -> None:
        self.dimension = dimension
        generator = generator_for("student_mixture", dimension)
        means = torch.rand(NUM_MODES, dimension, generator=generator, dtype=torch.float64)
        self.means = REACH * (2 * means - 1)
        self.mode_masses = torch.full((NUM_MODES,), 1 / NUM_MODES, dtype=torch.float64)

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        half = 0.5 * (FREEDOM + 1)
        constant = math.lgamma(half) - math.lgamma(FREEDOM / 2) - 0.5 * math.log(math.pi * FREEDOM)
        squares = (x[:, None] - self.means.to(x)).square()
        parts = (constant - half * (1 + squares / FREEDOM).log()).sum(2)
        return -(parts.logsumexp(1) - math.log(NUM_MODES))

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """See `Energy.sample`: a normal number over the root of an exponential one, which is chi^2_2 / 2."""
        which = torch.randint(NUM_MODES, (number,), generator=generator)
        uniform = torch.rand(number, self.dimension, generator=generator, dtype=torch.float64)
        scale = (-torch.log1p(-uniform)).clamp(min=1e-300).rsqrt()
        return self.means[which] + scale * normal(generator, number, self.dimension)

    def modes(self, x: Tensor) -> Tensor:
        """See `Energy.modes`: the nearest mean."""
        return nearest_point(x, self.means)
