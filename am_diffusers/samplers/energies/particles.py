"""Particles that see only each other: double-well pairs and Lennard-Jones clusters.

Where all of them are is left out: a state is the coordinates of the *centred* positions in an orthonormal
basis of those of mean 0, (particles - 1) * space of them. Whatever a sampler draws is then invariant to
moving them all, and noise, bridges and constants need no other rule.
"""

import torch
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy

SOFT = 1e-3
"""Added to squared distances: the energy of particles at one place is finite."""


def centred_basis(num_particles: int) -> Tensor:
    """Orthonormal basis of the numbers per particle that add up to 0, (particles, particles - 1) float64."""
    centring = torch.eye(num_particles, dtype=torch.float64) - 1 / num_particles
    return torch.linalg.eigh(centring).eigenvectors[:, 1:]


class Particles(Energy):
    """Particles with an energy of their pairs' squared distances.

    Args:
        dimension: (particles - 1) * space, for at least 2 particles.

    Raises:
        ValueError: if no number of particles has as many coordinates.
    """

    space: int
    name: str

    def __init__(self, dimension: int) -> None:
        if dimension < 1 or dimension % self.space:
            raise ValueError(
                f"{self.name} has (particles - 1) x {self.space} coordinates, its centre left out: "
                f"the dimension must be a multiple of {self.space}, got {dimension}"
            )
        self.dimension, self.num_particles = dimension, dimension // self.space + 1
        self.basis = centred_basis(self.num_particles)
        self._pairs = torch.triu_indices(self.num_particles, self.num_particles, 1)

    def positions(self, x: Tensor) -> Tensor:
        """Centred positions of states (B, dimension), (B, particles, space)."""
        return self.basis.to(x) @ x.reshape(len(x), self.num_particles - 1, self.space)

    def squared_distances(self, positions: Tensor) -> Tensor:
        """Squared distances of all pairs of particles, softened, (B, pairs)."""
        one, other = self._pairs
        return (positions[:, one] - positions[:, other]).square().sum(2) + SOFT


class DoubleWellPairs(Particles):
    """Double wells of distances in the plane, -4 (d - 4)^2 + .9 (d - 4)^4 a pair; DW-4 has 4 particles."""

    space, name, spread, width = 2, "double_well_particles", 2.0, 0.2

    def __init__(self, dimension: int = 6) -> None:
        super().__init__(dimension)

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        apart = self.squared_distances(self.positions(x)).sqrt() - 4
        return (-4 * apart.square() + 0.9 * apart.square().square()).sum(1)


class LennardJones(Particles):
    """Lennard-Jones clusters in space, in a harmonic trap: LJ-13 has 13 particles.

    d^-12 - 2 d^-6 per pair, and half the squared distance of each particle from the centre.
    """

    space, name, spread, width = 3, "lennard_jones", 0.7, 0.1

    def __init__(self, dimension: int = 36) -> None:
        super().__init__(dimension)

    def energy(self, x: Tensor) -> Tensor:
        """See `Energy.energy`."""
        sixth = self.squared_distances(self.positions(x)).pow(-3)
        return (sixth * (sixth - 2)).sum(1) + 0.5 * x.square().sum(1)
