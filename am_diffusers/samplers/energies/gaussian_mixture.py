"""Mixtures of Gaussians of one width; GMM40 has forty, far apart."""

import torch
from torch import Tensor

from am_diffusers.noise import generator_for
from am_diffusers.samplers.energies.base import Energy, log_normal, nearest_point, normal

NUM_MODES, REACH = 40, 40.0


class GaussianMixture(Energy):
    """Mixture of Gaussians N(mean, width^2 I), normalised.

    Args:
        means: (M, dimension).
        masses: (M,), positive, adding up to 1.
        width: standard deviation of each.
    """

    log_z = 0.0

    def __init__(self, means: Tensor, masses: Tensor, width: float) -> None:
        self.means, self.masses, self.width = means.double(), masses.double(), width
        self.mode_masses = self.masses
        self.dimension = means.shape[1]
        second = (masses.double()[:, None] * self.means.square()).sum(0).mean()
        self.spread = (second.item() + width**2) ** 0.5

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        parts = log_normal(x[:, None], self.means.to(x), self.width**2)
        return -(parts + self.masses.to(x).log()).logsumexp(1)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """See `Energy.sample`."""
        which = torch.multinomial(self.masses, number, replacement=True, generator=generator)
        return self.means[which] + self.width * normal(generator, number, self.dimension)

    def modes(self, x: Tensor) -> Tensor:
        """See `Energy.modes`: the nearest mean."""
        return nearest_point(x, self.means)


class GMM40(GaussianMixture):
    """Forty Gaussians of variance 1 and equal mass; means uniform in [-40, 40]^dimension, always the same."""

    def __init__(self, dimension: int = 2) -> None:
        generator = generator_for("gmm40", dimension)
        means = torch.rand(NUM_MODES, dimension, generator=generator, dtype=torch.float64)
        super().__init__(REACH * (2 * means - 1), torch.full((NUM_MODES,), 1 / NUM_MODES), 1.0)
