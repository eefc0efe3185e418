"""Energies: constants, exact samples, modes, and what particles are invariant to."""

import math

import pytest
import torch

from am_diffusers.noise import generator_for
from am_diffusers.samplers.energies import ENERGIES, find_energy
from am_diffusers.samplers.energies.many_well import ManyWell
from am_diffusers.samplers.energies.particles import DoubleWellPairs, LennardJones
from am_diffusers.samplers.parts.gradients import Gradients, clip_norm
from am_diffusers.system.failures import NonFiniteError

SMALL = {"lennard_jones": 9, "gmm40": 2, "student_mixture": 3}


def small(name):
    return find_energy(name, SMALL.get(name))


@pytest.mark.parametrize("name", ENERGIES)
def test_gradients_and_hessian_products_are_finite_and_right(name):
    """Against finite differences in float64; the second derivative is what annealing takes."""
    energy, generator = small(name), generator_for(0)
    x = energy.spread * torch.randn(4, energy.dimension, generator=generator, dtype=torch.float64)
    x = torch.cat([x, torch.zeros(1, energy.dimension, dtype=torch.float64)])  # particles at one place
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leaf, value, gradient = Gradients(energy).differentiable(x)
    (product,) = torch.autograd.grad(gradient, leaf, direction)
    assert product.isfinite().all()
    x, direction, step = x[:4], direction[:4] / direction[:4].norm(dim=1, keepdim=True), 1e-5
    slope = (energy.energy(x + step * direction) - energy.energy(x - step * direction)) / (2 * step)
    scale = gradient[:4].norm(dim=1)
    assert (((gradient[:4] * direction).sum(1) - slope).abs() < 1e-4 * (1 + scale)).all()
    assert value.dtype == torch.float64


@pytest.mark.parametrize("name", ["gaussian", "gmm40", "funnel", "student_mixture", "many_well"])
def test_exact_samples_have_the_law_of_the_energy(name):
    """Stein: f(x) . grad E and the divergence of f have the same mean; f is bounded, for heavy tails."""
    energy = small(name)
    x = energy.sample(20_000, generator_for(1))
    _, gradient = Gradients(energy)(x)
    bounded, slope = torch.tanh(x / 3), (1 - torch.tanh(x / 3).square()) / 3
    terms = (bounded * gradient - slope).mean(1)
    assert abs(terms.mean().item()) < 4 * terms.std().item() / len(x) ** 0.5


@pytest.mark.parametrize("name", ["gmm40", "student_mixture", "many_well"])
def test_exact_samples_have_the_mode_masses(name):
    energy = small(name)
    where = energy.modes(energy.sample(20_000, generator_for(1)))
    share = torch.bincount(where, minlength=len(energy.mode_masses)) / 20_000
    # Neighbouring modes overlap a little in two or three dimensions.
    assert 0.5 * (share - energy.mode_masses).abs().sum() < (0.1 if name == "student_mixture" else 0.04)


@pytest.mark.parametrize(
    ("name", "dimension"), [("gaussian", 1), ("gmm40", 1), ("many_well", 1), ("student_mixture", 1)]
)
def test_constants_on_a_line(name, dimension):
    energy = find_energy(name, dimension)
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    density = torch.cat([(-energy.energy(part[:, None])).exp() for part in grid.split(20_000)])
    rest = 0.02 if name == "student_mixture" else 1e-6  # its tails
    assert torch.trapezoid(density, grid).log().item() == pytest.approx(energy.log_z, abs=rest)


def test_many_well_is_the_published_one():
    """MW-5: 32 modes, mean energy 2.58, mean squared gradient 12.6^2, the trace of the mean Hessian."""
    energy = ManyWell(5)
    x = energy.sample(20_000, generator_for(0))
    value, gradient = Gradients(energy)(x)
    assert len(energy.mode_masses) == 32
    assert value.mean().item() == pytest.approx(2.58, abs=0.05)
    assert gradient.square().sum(1).mean().sqrt().item() == pytest.approx(12.6, abs=0.2)


@pytest.mark.parametrize("energy", [DoubleWellPairs(6), LennardJones(9)])
def test_particles_are_centred_and_only_their_distances_count(energy):
    x = torch.randn(5, energy.dimension, generator=generator_for(3), dtype=torch.float64)
    positions = energy.positions(x)
    assert positions.shape == (5, energy.num_particles, energy.space)
    torch.testing.assert_close(positions.sum(1), torch.zeros(5, energy.space).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(positions.square().sum((1, 2)), x.square().sum(1))  # a unit basis
    turn = torch.linalg.qr(torch.randn(energy.space, energy.space, generator=generator_for(4)).double()).Q
    for moved in (positions @ turn, positions.flip(1)):
        back = (energy.basis.T @ moved).reshape(5, -1)
        torch.testing.assert_close(energy.energy(back), energy.energy(x))


def test_the_law_of_two_particles_is_that_of_their_distance():
    """In the plane: the distance d = sqrt(2) |x| has density d exp(-u(d))."""
    energy = DoubleWellPairs(2)
    x = torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    apart = math.sqrt(18 + 1e-3) - 4
    expected = -4 * apart**2 + 0.9 * apart**4
    assert energy.energy(x).tolist() == pytest.approx([expected, expected])


@pytest.mark.parametrize(
    ("name", "dimension", "words"),
    [
        ("gmm4", None, "did you mean 'gmm40'"),
        ("lennard_jones", 7, "multiple of 3"),
        ("funnel", 1, "at least 2 dimensions"),
        ("many_well", 40, "from 1 to 16"),
        ("math:sqrt", None, "called with `dimension` alone"),
        ("math:nothing", None, "nothing"),
        ("no_such_module:X", None, "no_such_module"),
        ("collections:Counter", None, "must derive from"),
    ],
)
def test_other_energies_are_refused(name, dimension, words):
    with pytest.raises(ValueError, match=words):
        find_energy(name, dimension)


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_law.py").write_text(
        "from am_diffusers.samplers.energies.base import Energy\n"
        "class Bowl(Energy):\n"
        "    def __init__(self, dimension=3):\n"
        "        self.dimension = dimension\n"
        "    def energy(self, x):\n"
        "        return x.square().sum(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_energy("own_law:Bowl").dimension == 3
    assert find_energy("own_law:Bowl", 4).dimension == 4


def test_gradients_are_clipped_by_norm_and_counted():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(clip_norm(gradient, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    gradients = Gradients(find_energy("gaussian"), 0.5)
    x = torch.zeros(3, 2)
    assert gradients(x)[1].norm(dim=1).tolist() == pytest.approx([0.5] * 3)
    gradients.values(x)
    assert gradients.calls == 6


def test_an_energy_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match=r"isn't finite at \[nan"):
        Gradients(find_energy("gaussian"))(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))
