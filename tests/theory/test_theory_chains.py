"""The identities of docs/theory.md for chains of finitely many steps, memory included, in float64."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from am_diffusers.adjoint import full_adjoint, lean_adjoint, terminal_adjoint
from am_diffusers.matching import matching_target
from am_diffusers.rollout import rollout
from am_diffusers.transitions import (
    Transitions,
    ancestral,
    memoryless_euler,
    memoryless_local_linear,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField, VelocityField
from fixed_points import GRID, base_and_jacobian, fixed_point
from oracles import Mixture, affine, chain_moments, float64, gaussian, unconditional
from pull_backs import swept

STOCHASTIC = [memoryless_euler, memoryless_local_linear, ancestral]
LAW = gaussian(0.4, 0.3)
Line = tuple[float, float]


def close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def with_memory(sigmas: Tensor, strength: float) -> Transitions:
    """Euler steps of the SDE with eta = strength * sigma, which forgets a part of its start only."""
    s, t, h = sigmas[:-1], 1 - sigmas[:-1], -sigmas.diff()
    table = Transitions(sigmas, 1 - strength * h, -h * (1 + strength * t), (2 * strength * s * h).sqrt())
    for coefficients, last in ((table.x_coef, 1.0), (table.v_coef, -sigmas[-2]), (table.std, 0.0)):
        coefficients[-1] = last
    return table


def steered(lines: list[Line], table: Transitions, scale: float = 1.0) -> VelocityField:
    """Velocity of LAW plus scale * (a x + b), (a, b) by step."""
    rows = torch.tensor([*lines, (0.0, 0.0)], dtype=torch.float64)

    def velocity(x, sigma, cond):
        a, b = rows[torch.searchsorted(-table.sigmas, -sigma)].split(1, dim=1)
        return LAW.velocity(x, sigma) + scale * (a * x + b)

    return CallableField(velocity)


def mean_step(table: Transitions, k: int) -> Line:
    """Slope and intercept of the base's mean after step k."""
    slope, intercept = affine(LAW.field(), table.sigmas[k].item())
    x_coef, v_coef = table.x_coef[k].item(), table.v_coef[k].item()
    return x_coef + v_coef * slope, v_coef * intercept


def optimum(table: Transitions, curvature: float, best: float) -> list[Line]:
    """Change of velocity by step at the fixed point of right pairing, for reward -curvature/2 (x - best)^2.

    Backwards: if E[adjoint_{k+1} | x_{k+1}] = p x + q, the shift d of step k solves
    d = -std^2 (p (mean + d) + q).
    """
    slope, intercept = mean_step(table, table.num_steps - 1)
    p, q = slope * curvature * slope, slope * curvature * (intercept - best)
    lines: list[Line] = []
    for k in range(table.num_steps - 2, -1, -1):
        slope, intercept = mean_step(table, k)
        shrink = 1 / (1 + table.std[k].item() ** 2 * p)
        p, q, right = slope * shrink * p * slope, slope * shrink * (p * intercept + q), (p, q)
        factor = -shrink * table.std[k].item() ** 2 / table.v_coef[k].item()
        lines.insert(0, (factor * right[0] * slope, factor * (right[0] * intercept + right[1])))
    return lines


# -------------------------------------------------------------------------------------- lean and basic


@pytest.mark.parametrize("build", STOCHASTIC)
def test_lean_and_full_adjoint_have_one_mean_at_the_optimum_and_only_there(build):
    """Everything is affine in the noise, so conditional means are the values without noise: exact."""
    table, curvature, best = build(uniform_sigmas(8)), 2.5, 1.1
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    cond, lines = unconditional(5), optimum(table, curvature, best)

    def gaps(scale: float, noise: Tensor) -> dict[int, Tensor]:
        policy = steered(lines, table, scale)
        trajectory = rollout(policy, table, cond, x, lambda k: noise)

        def terminal(final):
            return terminal_adjoint(-(final - best), curvature)

        lean = swept(lean_adjoint, LAW.field(), trajectory, terminal).adjoints
        full = swept(full_adjoint, LAW.field(), trajectory, terminal, policy).adjoints
        return {k: lean[k] - full[k] for k in range(1, 7)}

    still, noisy = torch.zeros_like(x), torch.full_like(x, 0.8)
    for k, gap in gaps(1.0, still).items():
        close(gap, torch.zeros_like(gap), 1e-12)
        assert gaps(0.5, still)[k].abs().max() > 1e-3
        assert gaps(1.0, noisy)[k].abs().max() > 1e-3  # of single trajectories they differ


@pytest.mark.parametrize("build", STOCHASTIC)
def test_the_fixed_point_of_the_regression_is_stationary_for_the_chains_own_cost(build):
    """Exact path KL minus reward, differentiated in the coefficients of affine controls of all steps.

    That `optimum` is the fixed point: its velocities are the targets' means, those of noiseless trajectories.
    """
    table, curvature, best = build(uniform_sigmas(8)), 2.5, 1.1
    policy = steered(optimum(table, curvature, best), table)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    trajectory = rollout(policy, table, unconditional(5), x, lambda k: torch.zeros_like(x))
    sweep = swept(lean_adjoint, LAW.field(), trajectory, lambda final: curvature * (final - best))
    for k in range(7):
        right, base = sweep.adjoints[k + 1], sweep.velocity_base[k]
        target = matching_target(table, k, velocity_base=base, adjoint_right=right, adjoint_left=None)
        close(target, trajectory.velocities[k], 1e-12)

    def cost(lines: Tensor) -> Tensor:
        mean, second, total = float64(0.6, 0.36, 0.0).unbind()  # of x_k and x_k^2, from x_0 = .6
        for k in range(7):
            (slope, intercept), (a, b), v = mean_step(table, k), lines[k], table.v_coef[k]
            weight = 0.5 * (v / table.std[k]) ** 2
            total = total + weight * (a * a * second + 2 * a * b * mean + b * b)
            f, e = slope + v * a, intercept + v * b
            mean, second = f * mean + e, f * f * second + 2 * f * e * mean + e * e + table.std[k] ** 2
        slope, intercept = mean_step(table, 7)
        offset = intercept - best
        return total + curvature / 2 * (slope**2 * second + 2 * slope * offset * mean + offset**2)

    lines = torch.tensor(optimum(table, curvature, best), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cost(lines), lines)
    close(gradient, torch.zeros_like(gradient), 1e-12)
    away = (0.9 * lines.detach()).requires_grad_(True)
    assert torch.autograd.grad(cost(away), away)[0].abs().max() > 1e-2


# --------------------------------------------------------------------------------------------- path KL


@pytest.mark.parametrize("build", STOCHASTIC)
def test_the_path_kl_of_a_chain_is_the_kl_of_its_trajectories(build):
    """From x_0 = .6: one KL of two joint Gaussians of x_1 .. x_{K-1} against the mean of the steps' sum."""
    table, start = build(uniform_sigmas(6)), 0.6
    torch.manual_seed(0)
    lines = [(a.item(), b.item()) for a, b in torch.randn(5, 2, dtype=torch.float64)]
    policy, base = steered(lines, table), LAW.field()

    def joint(field: VelocityField) -> MultivariateNormal:
        mean, root = float64(start), torch.zeros(1, 5, dtype=torch.float64)
        means, rows = [], []
        for k in range(5):
            slope, intercept = affine(field, table.sigmas[k].item())
            x_coef, v_coef = table.x_coef[k], table.v_coef[k]
            factor = x_coef + v_coef * slope
            mean = factor * mean + v_coef * intercept
            root = factor * root + table.std[k] * torch.eye(5, dtype=torch.float64)[k]
            means, rows = [*means, mean], [*rows, root]
        return MultivariateNormal(torch.cat(means), scale_tril=torch.cat(rows))

    law = joint(policy)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(5):
        mean, std = (start, 0.0) if k == 0 else (law.mean[k - 1], law.variance[k - 1].sqrt())
        x = float64(mean - std, mean + std)[:, None]  # their mean of a square is the Gaussian's
        sigma = table.sigmas[k].expand(2)
        both = (field(x, sigma, unconditional(2)) for field in (policy, base))
        total = total + table.path_kl(k, *both).mean()
    assert total > 0.1
    close(total, kl_divergence(law, joint(base)), 1e-10)


@pytest.mark.parametrize("build", STOCHASTIC)
def test_the_path_kl_of_a_chain_tends_to_girsanovs_integral(build):
    """Integral of |u|^2 / 2 over t, u = -(velocity_policy - velocity_base) sqrt(2 t / s): first order."""
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)

    def shift(s):
        return s * (0.5 + torch.sin(3 * s))

    expected = torch.trapezoid((1 - grid) * grid * (0.5 + torch.sin(3 * grid)) ** 2, grid).item()
    errors = []
    for num_steps in (200, 400):
        table = build(uniform_sigmas(num_steps))
        zero = torch.zeros(1, 1, dtype=torch.float64)
        parts = [table.path_kl(k, shift(table.sigmas[k]) + zero, zero) for k in range(num_steps)]
        errors.append(sum(part.item() for part in parts) - expected)
    assert abs(errors[1]) < 0.05 * expected
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.25)


# ---------------------------------------------------------------------------------------------- memory

MODES = Mixture(float64(0.5, 0.5), float64(-0.8, 0.8)[:, None], float64(0.2, 0.2) ** 2)


def reward(clean: Tensor) -> Tensor:
    return 2 * torch.tanh(1.5 * clean)


def terminal(final: Tensor) -> Tensor:
    x = final.clone().requires_grad_(True)
    return -torch.autograd.grad(reward(x).sum(), x)[0]


class ChainOnGrid:
    """A chain as matrices on GRID: laws of its last noisy state x_{K-1}, from which the end point follows."""

    def __init__(self, table: Transitions) -> None:
        self.table, last = table, table.num_steps - 1
        base = {k: base_and_jacobian(MODES, table.sigmas[k].item())[0] for k in range(table.num_steps)}
        self.base, self.end = base, table.mean(last, GRID, base[last])
        self.start = (-0.5 * GRID**2).softmax(0)

    def kernel(self, k: int, velocity: Tensor) -> Tensor:
        mean = self.table.mean(k, GRID, velocity)
        return (-0.5 * ((GRID - mean[:, None]) / self.table.std[k]) ** 2).softmax(1)

    def law(self, velocities: dict[int, Tensor], start: Tensor) -> Tensor:
        for k in range(self.table.num_steps - 1):
            start = start @ self.kernel(k, velocities[k])
        return start

    def tilt(self) -> Tensor:
        """Law of the base chain times exp(reward of the end), normalised."""
        tilted = self.law(self.base, self.start) * reward(self.end).exp()
        return tilted / tilted.sum()

    def biased(self) -> Tensor:
        """Marginal of p_base(x_0, x_end) exp(reward(x_end) + V(x_0)), V = -log E[exp(reward) | x_0]."""
        found = reward(self.end).exp()
        for k in range(self.table.num_steps - 2, -1, -1):
            found = self.kernel(k, self.base[k]) @ found
        return self.law(self.base, self.start / found) * reward(self.end).exp()

    def learned(self) -> Tensor:
        """Law of the policy that Adjoint Matching converges to."""
        by_sigma = fixed_point(MODES, terminal, self.table, "right")
        sigmas = self.table.sigmas.tolist()
        return self.law({k: by_sigma[sigmas[k]] for k in range(self.table.num_steps)}, self.start)


def total_variation(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().sum().item() / 2


def test_the_optimum_with_memory_is_the_biased_law_and_without_it_the_tilt():
    """Exact laws of chains. A policy shifts means only, which costs a total variation of order 1 / K."""
    to_biased, to_tilt = [], []
    for num_steps in (20, 40):
        chain = ChainOnGrid(with_memory(uniform_sigmas(num_steps), 0.2))
        learned = chain.learned()
        to_biased.append(total_variation(learned, chain.biased()))
        to_tilt.append(total_variation(learned, chain.tilt()))
    assert to_biased[1] < 0.015
    assert to_biased[0] / to_biased[1] == pytest.approx(2, abs=0.3)
    assert min(to_tilt) > 0.19
    without = ChainOnGrid(memoryless_local_linear(uniform_sigmas(40)))
    assert total_variation(without.biased(), without.tilt()) < 1e-4
    assert total_variation(without.learned(), without.tilt()) < 0.02


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_memory_weakens_a_linear_reward_by_the_square_of_the_correlation(strength):
    """On N(0, 1), eta = strength * sigma: corr = exp(-strength pi / 4), shift = (1 - corr^2) slope."""
    law, slope, errors = gaussian(0.0, 1.0), 0.9, []
    correlation = math.exp(-strength * math.pi / 4)
    for num_steps in (200, 400):
        table = with_memory(uniform_sigmas(num_steps), strength)
        assert chain_moments(table, law)[0] == pytest.approx(correlation, rel=5 / num_steps)
        mean, adjoint = 0.0, -slope
        for k in range(num_steps - 1, -1, -1):  # the adjoint doesn't depend on the state
            slope_of_base, _ = affine(law.field(), table.sigmas[k].item())
            factor = table.x_coef[k].item() + table.v_coef[k].item() * slope_of_base
            if table.std[k] > 0:
                right = float64(adjoint)[:, None]
                zero = torch.zeros_like(right)
                target = matching_target(table, k, velocity_base=zero, adjoint_right=right, adjoint_left=None)
                mean += table.v_coef[k].item() * target.item() * (adjoint / -slope)
            adjoint = factor * adjoint
        errors.append(mean - (1 - correlation**2) * slope)
    assert abs(errors[1]) < 0.01 * slope
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("theta", [0.5, 1.0, 2.0])
def test_other_samplers_need_the_memoryless_schedule_itself(theta):
    """Ends are independent for eta = theta s/t, every theta > 0, so that the SDE's mean is the tilt's.

    That of the ODE with the same velocity is only for theta = 1. Pictures N(0, .3), reward slope * x.
    """
    variance, slope = 0.3, 0.9

    def rates(s, y):
        """Of the gains from sigma to the end of SDE and ODE, and of the shifts of both ends."""
        t, (gain, gain_ode, _, _) = 1 - s, y
        velocity = (s - t * variance) / (t**2 * variance + s**2)
        push = 2 * theta * s / t * slope * gain  # change of the drift: -2 eta grad V
        return [
            (-(1 + theta) * velocity - theta / t) * gain,
            -velocity * gain_ode,
            push * gain,
            push / (1 + theta) * gain_ode,  # the velocity enters the SDE's drift 1 + theta times
        ]

    found = solve_ivp(rates, (0, 1 - 1e-10), [1, 1, 0, 0], rtol=1e-10, atol=1e-13, method="LSODA").y[:, -1]
    tilt = slope * variance
    assert found[0] < 1e-4  # the end doesn't depend on the start
    assert found[2] == pytest.approx(tilt, rel=1e-4)
    assert (abs(found[3] / tilt - 1) < 1e-4) == (theta == 1)
    assert theta == 1 or abs(found[3] / tilt - 1) > 0.1
