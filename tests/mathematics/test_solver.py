"""Table solvers: their noise, and the path KL against closed forms of Gaussian laws."""

import pytest
import torch

from am_diffusers.noise import draw, generators_for
from am_diffusers.rollout import TableSolver, sample
from am_diffusers.transitions import (
    TRANSITIONS,
    memoryless_local_linear,
    ode_euler,
    shifted_sigmas,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField
from oracles import THREE_MODES, CountingField, affine, float64, gaussian, unconditional

STOCHASTIC = sorted(TRANSITIONS.keys() - {"ode_euler"})


def noise_and_generators(num, dim=1, seed=0):
    noise = draw(generators_for(seed, 0, range(num)), (dim,), torch.float64)
    return noise, generators_for(seed, 1, range(num))


@pytest.mark.parametrize("name", sorted(TRANSITIONS))
def test_a_table_solver_samples_its_table_with_each_rows_own_noise(name):
    table, field, cond = TRANSITIONS[name](uniform_sigmas(5)), THREE_MODES.field(), unconditional(4)
    noise, generators = noise_and_generators(4, 2)
    own = noise_and_generators(4, 2)[1]
    expected = sample(field, table, cond, noise, lambda k: draw(own, (2,), torch.float64))
    latents, path_kl = TableSolver(table)(field, cond, noise, generators)
    assert torch.equal(latents, expected)
    assert path_kl is None
    untouched = noise_and_generators(4, 2)[1]
    drawn = any(
        not torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, untouched, strict=True)
    )
    assert drawn == (name != "ode_euler")


def test_the_ode_has_no_path_kl_and_does_not_call_the_base():
    base = CountingField(THREE_MODES.field())
    noise, generators = noise_and_generators(3, 2)
    solver = TableSolver(ode_euler(uniform_sigmas(4)))
    assert solver(base, unconditional(3), noise, generators, base=base).path_kl is None
    assert len(base.calls) == 4


@pytest.mark.parametrize("name", STOCHASTIC)
def test_path_kl_of_a_constant_shift(name):
    """Velocities c apart everywhere: sum over stochastic steps of D c^2 v_coef^2 / (2 std^2), on any path."""
    table, shift, dim = TRANSITIONS[name](shifted_sigmas(6, 3.0)), 0.3, 2
    law = THREE_MODES
    policy = CallableField(lambda x, sigma, cond: law.velocity(x, sigma) + shift)
    base = CountingField(law.field())
    noise, generators = noise_and_generators(5, dim)
    solution = TableSolver(table)(policy, unconditional(5), noise, generators, base=base)
    rates = [(table.v_coef[k] / table.std[k]).item() ** 2 for k in range(6) if table.std[k] > 0]
    assert len(rates) >= 4
    stochastic = table.sigmas[:-1][table.std > 0].tolist()
    assert base.calls == [*stochastic, table.sigmas[-2].item()], (
        "one call a stochastic step, and the last step"
    )
    expected = torch.full((5,), dim * shift**2 / 2 * sum(rates), dtype=torch.float64)
    torch.testing.assert_close(solution.path_kl, expected, rtol=1e-10, atol=0)
    last = table.sigmas[-2].item()
    of_training = CallableField(
        lambda x, sigma, cond: law.velocity(x, sigma) + shift * float(sigma[0] != last)
    )
    without = TableSolver(table)(of_training, unconditional(5), noise, noise_and_generators(5, dim)[1])
    torch.testing.assert_close(
        solution.latents, without.latents, rtol=0, atol=1e-14
    )  # its last step the base's


def test_path_kl_of_the_base_is_zero():
    field = THREE_MODES.field()
    noise, generators = noise_and_generators(5, 2)
    solver = TableSolver(memoryless_local_linear(uniform_sigmas(6)))
    path_kl = solver(field, unconditional(5), noise, generators, base=field).path_kl
    assert torch.equal(path_kl, torch.zeros(5, dtype=torch.float64))


def test_path_kl_of_a_tilt_tends_to_the_kl_of_the_laws():
    """The memoryless SDE of a tilted law is the optimal control: KL(N(m + d, V) || N(m, V)) = d^2 / (2 V)."""
    base, shift, errors = gaussian(0.4, 0.25), 0.5, []
    tilted = base.tilted(float64(shift / 0.25))
    assert tilted.mean().item() == pytest.approx(0.9)
    for num_steps in (200, 400):
        noise, generators = noise_and_generators(2)
        solver = TableSolver(memoryless_local_linear(uniform_sigmas(num_steps)))
        path_kl = solver(tilted.field(), unconditional(2), noise, generators, base=base.field()).path_kl
        errors.append((path_kl - shift**2 / (2 * 0.25)).abs().max().item())
    assert errors[1] < 0.005
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)


def test_mean_path_kl_where_it_depends_on_the_path():
    """A policy of smaller variance: dv is affine in x, E[x_k^2] from the chain's moments; n = 4000."""
    base, policy = gaussian(0.4, 0.25), gaussian(0.1, 0.09)
    table, number = memoryless_local_linear(uniform_sigmas(8)), 4000
    mean, variance, expected = 0.0, 1.0, 0.0
    for k in range(table.num_steps - 1):
        sigma, v_coef, std = (value[k].item() for value in (table.sigmas, table.v_coef, table.std))
        (slope, start), (slope_base, start_base) = (affine(law.field(), sigma) for law in (policy, base))
        change, level = slope - slope_base, start - start_base
        second = change**2 * variance + (change * mean + level) ** 2
        expected += v_coef**2 / (2 * std**2) * second
        factor = table.x_coef[k].item() + v_coef * slope
        mean, variance = factor * mean + v_coef * start, factor**2 * variance + std**2
    noise, generators = noise_and_generators(number)
    solver = TableSolver(table)
    path_kl = solver(policy.field(), unconditional(number), noise, generators, base=base.field()).path_kl
    assert path_kl.shape == (number,)
    assert path_kl.mean().item() == pytest.approx(expected, abs=4 * path_kl.std().item() / number**0.5)
    assert path_kl.std() > 0.05 * expected
