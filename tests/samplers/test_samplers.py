"""Samplers of energies: Gaussian oracles of the annealed one, path weights, learned laws, buffers."""

import math

import pytest
import torch

from am_diffusers.adjoint import lean_adjoint
from am_diffusers.noise import generator_for
from am_diffusers.rollout import Trajectory
from am_diffusers.samplers import SAMPLERS
from am_diffusers.samplers.energies import find_energy
from am_diffusers.samplers.energies.gaussian import Gaussian
from am_diffusers.samplers.metrics import path_weights
from am_diffusers.samplers.naas import Annealing
from am_diffusers.samplers.parts.buffer import Buffer
from am_diffusers.samplers.parts.gradients import Gradients
from am_diffusers.samplers.parts.networks import rows_of
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import CallableField
from linear_annealing import LinearAnnealing

NONE = CallableField(lambda x, level, cond: torch.zeros_like(x))


def annealed(**changes):
    solved = LinearAnnealing(**changes)
    for sweep in range(14):
        solved.sweep(0.5 if sweep < 6 else 0.25)
    return solved


def test_annealing_of_a_gaussian_has_its_variances():
    """Source .4845, end .25, slope of the source's adjoint 1.064."""
    solved = annealed()
    source, end = solved.variances()
    assert source == pytest.approx(0.4845, rel=0.02)
    assert end == pytest.approx(0.25, rel=0.02)
    assert solved.value == pytest.approx(1.064, rel=0.04)


def test_without_the_source_stage_the_end_is_another_law():
    source, end = annealed(staged=False).variances()
    assert source == pytest.approx(1.0, rel=1e-6)
    assert abs(end - 0.25) > 0.02 * 0.25


def test_with_the_sign_of_the_running_cost_turned_the_end_is_another_law():
    _, end = annealed(sign=-1.0).variances()
    assert not abs(end - 0.25) < 0.2 * 0.25


@pytest.mark.parametrize("name", ["gmm40", "many_well", "funnel"])
def test_the_annealed_adjoint_is_the_lean_adjoint_with_its_running_cost(name):
    """Identity: the sweep by stored graphs and `lean_adjoint` with a state cost, in float64."""
    energy, steps, prior, diffusion = find_energy(name), 6, 2.0, 0.3
    gradients = Gradients(energy)
    annealing = Annealing(gradients, prior, steps, diffusion)
    source = prior * torch.randn(4, energy.dimension, generator=generator_for(0), dtype=torch.float64)
    paths = annealing.paths(NONE, source, generator_for(1))
    variance = torch.full((steps,), diffusion / steps, dtype=torch.float64)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    table = Transitions(grid, torch.ones(steps).double(), variance, variance.sqrt())

    def potential(x, share):
        return (1 - share) * x.square().sum(1) / (2 * prior**2) + share * energy.energy(x)

    def drift(x, level, cond):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            total = potential(x, 1 - level).sum()
            return -0.5 * torch.autograd.grad(total, x, create_graph=True)[0]

    def cost(x, level, cond):
        return steps * (potential(x, 1 - level + 1 / steps) - potential(x, 1 - level))

    states = paths.states[:-1]
    trajectory = Trajectory(states, torch.zeros_like(states[1:]), table, rows_of(4))
    swept = lean_adjoint(
        CallableField(drift), trajectory, torch.zeros_like(source), steps, with_left=True, state_cost=cost
    )
    for k in range(steps + 1):
        torch.testing.assert_close(paths.adjoints[k], swept.adjoints[k], rtol=1e-10, atol=1e-10)


def test_path_weights_of_an_untrained_annealing_give_log_z():
    """Any kernels give the constant: an energy shifted by 1.5, K = 40, within 4 standard errors."""

    class Shifted(Gaussian):
        def energy(self, x):
            return super().energy(x) + 1.5

    annealing = Annealing(Gradients(Shifted(2, 0.5, 0.5)), 1.0, 40, 4.0)
    source = torch.randn(20_000, 2, generator=generator_for(0), dtype=torch.float64)
    states, _, log_ratio = annealing.paths(NONE, source, generator_for(1), adjoints=False)
    prior = -0.5 * source.square().sum(1) - math.log(2 * math.pi)
    log_weights = log_ratio - annealing.gradients.energy.energy(states[-1]) - prior
    found = path_weights(log_weights)
    error = math.sqrt((1 / found.effective_share - 1) / len(source))
    assert found.log_z == pytest.approx(-1.5, abs=4 * error)
    assert found.elbo < -1.5
    assert error < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_untrained_path_weights_give_log_z(name):
    """Importance from the uncontrolled reference of each sampler, a Gaussian of known constant."""
    energy = Gaussian(1, 0.5, 0.5)
    sampler = SAMPLERS[name](energy, SAMPLERS[name].Settings().resolved(energy), 0)
    weights = path_weights(sampler.draw(20_000, generator_for(2)).log_weights)
    error = math.sqrt((1 / weights.effective_share - 1) / 20_000)
    assert weights.log_z == pytest.approx(0.0, abs=4 * error)
    assert error < 0.02


SHORT = {
    "adjoint_sampling": {"iterations": 60},
    "asbs": {"iterations": 75, "corrector_iterations": 5, "control_iterations": 20, "energy_warmup": 0.2},
    "naas": {"iterations": 40, "batch_size": 128, "num_steps": 30},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gaussian_is_learned(name):
    """By networks, in seconds: mean within .15 and deviation within 20 %; untrained they are far off."""
    energy = Gaussian(2, 1.0, 0.25)
    settings = SAMPLERS[name].Settings(**SHORT[name], gradient_steps=10, row_batch_size=256, ema_decay=0.95)
    sampler = SAMPLERS[name](energy, settings.resolved(energy), 0)

    def law():
        x = sampler.draw(2000, generator_for(5)).x
        return abs(x.mean().item() - 1.0), abs(x.std(0).mean().item() / 0.5 - 1)

    before = law()
    for iteration in range(settings.iterations):
        found = sampler.iterate(iteration)
    assert all(math.isfinite(value) for value in found.values())
    mean, deviation = law()
    assert (mean < 0.15, deviation < 0.2) == (True, True), (before, mean, deviation)
    assert not (before[0] < 0.15 and before[1] < 0.2), before
    weights = path_weights(sampler.draw(2000, generator_for(6)).log_weights)
    assert abs(weights.log_z) < 0.15
    assert weights.elbo < weights.log_z


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_that_was_saved_goes_on_bit_by_bit(name):
    energy = Gaussian(2)
    own = {"corrector_iterations": 2, "control_iterations": 2} if name == "asbs" else {}
    settings = SAMPLERS[name].Settings(
        iterations=6, batch_size=8, num_steps=4, gradient_steps=2, row_batch_size=16, hidden=8, **own
    )

    def new():
        return SAMPLERS[name](energy, settings.resolved(energy), 3)

    whole, first, second = new(), new(), new()
    for iteration in range(6):
        whole.iterate(iteration)
        if iteration < 3:
            first.iterate(iteration)
    second.load_state_dict(first.state_dict())
    for iteration in range(3, 6):
        second.iterate(iteration)
    drawn = [each.draw(5, generator_for(0)) for each in (whole, second)]
    assert torch.equal(drawn[0].x, drawn[1].x)
    assert torch.equal(drawn[0].log_weights, drawn[1].log_weights)
    assert whole.gradients.calls == second.gradients.calls > 0


def test_the_buffer_forgets_the_oldest():
    buffer = Buffer(3)
    buffer.push({"x": torch.arange(2.0)[:, None], "y": torch.arange(2.0)})
    buffer.push({"x": torch.arange(2.0, 4.0)[:, None], "y": torch.arange(2.0, 4.0)})
    assert len(buffer) == 3
    drawn = buffer.draw(100, generator_for(0))
    assert set(drawn["y"].tolist()) == {1.0, 2.0, 3.0}
    assert torch.equal(drawn["x"][:, 0], drawn["y"])
    buffer.clear()
    assert len(buffer) == 0
