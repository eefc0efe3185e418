"""Metrics of samplers: exact transport and its floor, mode masses, path weights and what the report says."""

import itertools
import math

import pytest
import torch

from am_diffusers.noise import generator_for
from am_diffusers.samplers.base import Drawn
from am_diffusers.samplers.energies import find_energy
from am_diffusers.samplers.energies.gaussian import Gaussian
from am_diffusers.samplers.metrics import (
    floor,
    masses,
    measure,
    path_weights,
    resampled,
    total_variation,
    transport_cost,
)
from am_diffusers.samplers.report import cautions


def test_the_transport_cost_is_that_of_the_best_assignment():
    x, y = (torch.randn(6, 3, generator=generator_for(seed), dtype=torch.float64) for seed in (0, 1))
    best = min(
        (x - y[list(order)]).square().sum(1).mean().item() for order in itertools.permutations(range(6))
    )
    assert transport_cost(x, y) == pytest.approx(best, rel=1e-12)
    assert transport_cost(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert transport_cost(x, x + 2) == pytest.approx(4 * 3, rel=1e-12)  # a shift is never worth reordering


def test_path_weights_of_known_numbers():
    found = path_weights(torch.tensor([0.0, math.log(3)]))
    assert found.elbo == pytest.approx(0.5 * math.log(3))
    assert found.log_z == pytest.approx(math.log(2))
    assert found.effective_share == pytest.approx((1 + 3) ** 2 / (2 * (1 + 9)))
    assert path_weights(torch.tensor([-800.0, -800.0])).log_z == pytest.approx(-800)


def test_resampling_by_path_weights_gives_the_law_of_the_energy():
    """Samples of N(0, 1) with the weights of N(1, .25): mean and variance within 4 standard errors."""
    x = torch.randn(20_000, 1, generator=generator_for(0), dtype=torch.float64)
    energy = Gaussian(1)
    weights = -energy.energy(x) + 0.5 * x[:, 0].square()
    again = resampled(Drawn(x, weights), 20_000, generator_for(1))
    share = path_weights(weights).effective_share
    assert again.mean().item() == pytest.approx(1.0, abs=4 * 0.5 / math.sqrt(share * 20_000))
    assert again.var().item() == pytest.approx(0.25, abs=4 * 0.25 * math.sqrt(2 / (share * 20_000)))


def test_masses_of_modes():
    energy = find_energy("many_well", 2)
    x = torch.tensor([[2.0, 2.0], [2.0, -2.0], [2.0, -2.1], [-2.0, -2.0]])
    assert masses(energy, x).tolist() == [0.25, 0.5, 0.0, 0.25]
    assert total_variation(energy, x) == pytest.approx(0.25)
    assert masses(Gaussian(2), x) is None


def test_measures_are_those_that_the_law_allows():
    generator, energy = generator_for(0), find_energy("many_well", 2)
    exact = floor(energy, 300, generator)
    assert set(exact) == {"mean_energy", "exact_energy", "transport", "modes_found", "mass_error"}
    assert exact["modes_found"] == 4
    away = measure(energy, energy.sample(300, generator).abs(), generator)  # one mode of four
    assert away["modes_found"] == 1
    assert away["mass_error"] == pytest.approx(0.75)
    assert away["transport"] > 5 * exact["transport"]
    particles = find_energy("double_well_particles")
    assert floor(particles, 10, generator) == {}
    assert set(measure(particles, torch.randn(10, 6), generator)) == {"mean_energy"}


@pytest.mark.parametrize(
    ("transport", "floor", "share", "begins"),
    [
        (3.1, {"transport": 2.0}, 0.9, "**Not converged**: the transport cost is 1.6 times"),
        (2.9, {"transport": 2.0}, 0.01, "A low matching loss"),
        (None, {}, 0.05, "**Not converged**, by its own path weights"),
        (None, {}, 0.5, "A low matching loss"),
    ],
)
def test_a_run_that_is_far_from_its_floor_is_said_not_to_have_converged(transport, floor, share, begins):
    """1.5 times the floor; by the path weights where there is none. Nothing is ever called converged."""
    samples = {} if transport is None else {"transport": transport}
    numbers = {"samples": samples, "floor": floor, "weights": {"effective_share": share}}
    lines = cautions(numbers)
    assert lines[0].startswith(begins)
    assert lines[-2].startswith("A low matching loss isn't convergence")


def test_the_floors_of_many_well_and_forty_gaussians():
    """Exact against exact, 1000 samples: as far apart as 2000 are, .86-1.46 and 10-17, or a little more."""
    assert 0.8 < floor(find_energy("many_well"), 1000, generator_for(0))["transport"] < 2.2
    assert 8 < floor(find_energy("gmm40"), 1000, generator_for(0))["transport"] < 40
