"""Transition tables against integration, Diffusers, torch.distributions and closed-form chains."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp
from torch.distributions import Independent, Normal, kl_divergence

from am_diffusers.transitions import (
    TRANSITIONS,
    Transitions,
    ancestral,
    jitter_sigmas,
    memoryless_euler,
    memoryless_local_linear,
    ode_euler,
    shifted_sigmas,
    uniform_sigmas,
)
from oracles import THREE_MODES, chain_moments, float64, gaussian

STOCHASTIC = [memoryless_euler, memoryless_local_linear, ancestral]
GRIDS = [uniform_sigmas(6), shifted_sigmas(9, 3.0), float64(1, 0.93, 0.5, 0.31, 0.3, 0.1, 0)]


def start_end_correlation(table: Transitions, law) -> float:
    gain, variance = chain_moments(table, law)
    return gain / (gain**2 + variance) ** 0.5


def integrate_linear_sde(sigma: float, sigma_next: float) -> np.ndarray:
    """Gain, response to -velocity and variance of dx = (2 u - x/t) dt + sqrt(2 (1 - t) / t) dW."""

    def rates(t, y):
        return [-y[0] / t, 2 - y[1] / t, -2 * y[2] / t + 2 * (1 - t) / t]

    # At t = 0 the equation is singular but forgets where it starts: a start at 1e-11 costs 1e-11.
    start = max(1 - sigma, 1e-11)
    solution = solve_ivp(
        rates, (start, 1 - sigma_next), [1.0, 0.0, 0.0], rtol=1e-11, atol=1e-13, method="LSODA"
    )
    return solution.y[:, -1]


@pytest.mark.parametrize("sigmas", GRIDS)
def test_local_linear_coefficients_solve_the_linear_sde(sigmas):
    table = memoryless_local_linear(sigmas)
    for k in range(table.num_steps - 1):
        expected = integrate_linear_sde(sigmas[k].item(), sigmas[k + 1].item())
        got = [table.x_coef[k], -table.v_coef[k], table.std[k] ** 2]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8)


def test_published_coefficients_in_the_notation_of_the_paper():
    """It is X + h (2 v - X / (t + h)) + sqrt(h) sigma(t) xi, sigma(t)^2 = 2 (1 - t + h) / (t + h)."""
    h, table = 0.1, memoryless_euler(uniform_sigmas(10))
    torch.manual_seed(0)
    x, velocity, noise = torch.randn(3, 4, 2, dtype=torch.float64)
    for k in range(9):
        t, v = k * h, -velocity
        expected = x + h * (2 * v - x / (t + h)) + h**0.5 * (2 * (1 - t + h) / (t + h)) ** 0.5 * noise
        torch.testing.assert_close(table.step(k, x, velocity, noise), expected, rtol=0, atol=1e-12)


def test_published_coefficients_are_an_euler_step_of_the_same_sde():
    """One step of a grid refined n-fold tends to drift and diffusion of the SDE at t like 1/n."""
    errors = []
    for n in (1000, 2000):
        table, k = memoryless_euler(uniform_sigmas(n)), n // 4
        h, t = 1 / n, 0.25
        rates = torch.stack([(1 - table.x_coef[k]) / h, -table.v_coef[k] / h, table.std[k] ** 2 / h])
        errors.append((rates - float64(1 / t, 2.0, 2 * (1 - t) / t)).abs())
    assert (errors[0] < 0.05).all()
    torch.testing.assert_close(errors[0][[0, 2]] / errors[1][[0, 2]], float64(2, 2), rtol=0.02, atol=0)


@pytest.mark.parametrize("sigmas", GRIDS)
def test_ancestral_is_the_ddim_step_with_the_marginals_variance(sigmas):
    """Given clean, x' has the law N(t' clean, s'^2) when x has N(t clean, s^2)."""
    table = ancestral(sigmas)
    s, s_next = sigmas[:-1], sigmas[1:]
    # x = t clean + s noise, velocity = noise - clean
    of_clean = table.x_coef * (1 - s) - table.v_coef
    of_noise = table.x_coef * s + table.v_coef
    torch.testing.assert_close(of_clean, 1 - s_next, rtol=0, atol=1e-12)
    torch.testing.assert_close(of_noise**2 + table.std**2, s_next**2, rtol=0, atol=1e-12)
    backward = s_next**2 * (1 - ((1 - s) * s_next / (s * (1 - s_next))) ** 2)
    torch.testing.assert_close(table.std**2, backward, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", STOCHASTIC)
@pytest.mark.parametrize("sigmas", GRIDS)
def test_the_last_step_alone_is_deterministic_and_lands_on_the_clean_estimate(build, sigmas):
    table = build(sigmas)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    x = (1 - sigmas[-2]) * clean + sigmas[-2] * noise
    last = table.step(table.num_steps - 1, x, noise - clean, torch.randn_like(x))
    torch.testing.assert_close(last, clean, rtol=0, atol=1e-12)
    assert (table.std[:-1] > 0).all()
    assert table.std[-1] == 0


def test_ode_equals_the_diffusers_scheduler_on_the_sd3_grid():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    np.testing.assert_allclose(scheduler.sigmas[-3:], [0.5030, 0.0089, 0.0], rtol=0, atol=5e-5)
    scheduler.sigmas = scheduler.sigmas.double()
    table = ode_euler(scheduler.sigmas)
    torch.manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        x = torch.randn(2, 3, dtype=torch.float32)  # the scheduler rounds the state to float32
        velocity = torch.randn(2, 3, dtype=torch.float64)
        expected = scheduler.step(velocity, timestep, x).prev_sample
        torch.testing.assert_close(table.mean(k, x.double(), velocity), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", [2, 10, 28])
def test_shifted_grid_equals_the_diffusers_scheduler(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    np.testing.assert_allclose(shifted_sigmas(num_steps, 3.0), scheduler.sigmas, rtol=0, atol=1e-6)
    assert torch.equal(shifted_sigmas(num_steps, 1.0), uniform_sigmas(num_steps))


def test_log_prob_and_path_kl_equal_torch_distributions():
    table = memoryless_local_linear(uniform_sigmas(5))
    torch.manual_seed(0)
    x, x_next, policy, base = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    for k in range(4):
        law_policy, law_base = (
            Independent(Normal(table.mean(k, x, velocity), table.std[k]), 2) for velocity in (policy, base)
        )
        torch.testing.assert_close(
            table.log_prob(k, x_next, x, policy), law_policy.log_prob(x_next), rtol=0, atol=1e-10
        )
        torch.testing.assert_close(
            table.path_kl(k, policy, base), kl_divergence(law_policy, law_base), rtol=0, atol=1e-10
        )
    assert torch.equal(table.path_kl(4, policy, base), float64(*[0.0] * 6))
    with pytest.raises(ValueError, match="step 4 is deterministic"):
        table.log_prob(4, x_next, x, policy)


def test_ancestral_is_memoryless_exactly_for_any_data():
    """At sigma = 1 the clean estimate is the data's mean: x_1 does not depend on x_0."""
    table = ancestral(uniform_sigmas(5))
    torch.manual_seed(0)
    x = torch.randn(9, 2, dtype=torch.float64)
    first = table.mean(0, x, THREE_MODES.velocity(x, 1.0))
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=0, atol=1e-12)
    assert abs(start_end_correlation(ancestral(uniform_sigmas(20)), gaussian(0.7, 0.5))) < 1e-12


@pytest.mark.parametrize("variance", [1.0, 0.25, 0.01])
def test_local_linear_is_memoryless_up_to_the_square_of_the_step(variance):
    law = gaussian(0.0, variance)
    correlations = {
        k: abs(start_end_correlation(memoryless_local_linear(uniform_sigmas(k)), law))
        for k in (5, 10, 20, 40)
    }
    assert all(value <= 1 / k**2 for k, value in correlations.items()), correlations


def test_start_end_correlations_of_gaussian_data_have_the_documented_size():
    law = gaussian(0.0, 1.0)
    correlation = {
        (build, k): start_end_correlation(build(uniform_sigmas(k)), law)
        for build in STOCHASTIC
        for k in (5, 10)
    }
    assert correlation[memoryless_local_linear, 5] == pytest.approx(-0.03, abs=0.005)
    assert correlation[memoryless_local_linear, 10] == pytest.approx(-0.009, abs=0.0015)
    # A table with memory, for scale: the ODE carries the whole start to the end.
    assert start_end_correlation(ode_euler(uniform_sigmas(10)), law) == 1.0


@pytest.mark.parametrize("build", STOCHASTIC)
@pytest.mark.parametrize("variance", [1.0, 0.04])
def test_base_chains_converge_to_the_data_at_first_order(build, variance):
    law = gaussian(0.3, variance)
    errors = []
    for k in (200, 400):
        gain, conditional = chain_moments(build(uniform_sigmas(k)), law)
        errors.append(abs(gain**2 + conditional - variance) / variance)
    assert errors[1] < 0.2
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.4)


def test_coefficients_leave_dtype_alone():
    for build in TRANSITIONS.values():
        x = torch.randn(2, 3)
        assert build(uniform_sigmas(3)).step(0, x, x, x).dtype == torch.float32


@pytest.mark.parametrize("build", TRANSITIONS.values())
@pytest.mark.parametrize(
    "sigmas", [(1, 0.5, 0.6, 0), (1, 0.5, 0.5, 0), (1, 0.5, 0.1), (1.2, 0.5, 0), (0,), (1, float("nan"), 0)]
)
def test_grids_that_do_not_decrease_from_1_to_0_are_rejected(build, sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        build(float64(*sigmas))


@pytest.mark.parametrize("build", STOCHASTIC)
def test_stochastic_tables_need_pure_noise_and_two_steps(build):
    with pytest.raises(ValueError, match="pure noise"):
        build(float64(0.9, 0.5, 0))
    with pytest.raises(ValueError, match="at least 3 sigmas"):
        build(float64(1, 0))
    assert ode_euler(float64(0.9, 0)).num_steps == 1  # the ODE may start anywhere


@pytest.mark.parametrize("build", [memoryless_euler, memoryless_local_linear])
def test_grids_whose_last_noise_would_stay_are_for_the_ode_only(build):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="would stay in the image"):
        build(scheduler.sigmas)
    ode_euler(scheduler.sigmas)
    ancestral(scheduler.sigmas)  # adds at most the noise level it goes to


def test_jitter_moves_the_interior_only_and_keeps_the_order():
    sigmas = shifted_sigmas(10, 3.0)
    for seed in range(20):
        moved = jitter_sigmas(sigmas, 0.49, torch.Generator().manual_seed(seed))
        assert (moved.diff() < 0).all()
        assert moved[0] == 1
        assert moved[-1] == 0
        assert (moved[1:-1] != sigmas[1:-1]).all()
        memoryless_local_linear(moved)
    assert torch.equal(jitter_sigmas(sigmas, 0.0, torch.Generator()), sigmas)
    with pytest.raises(ValueError, match="jitter"):
        jitter_sigmas(sigmas, 0.5, torch.Generator())


def test_coefficients_of_the_wrong_shape_are_rejected():
    with pytest.raises(ValueError, match=r"Transitions.std: expected 2"):
        Transitions(uniform_sigmas(2), float64(1, 1), float64(1, 1), float64(1, 1, 1))
