"""Formulas in circulation that are wrong, each shown to fail where the right one holds (docs/theory.md)."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp

from am_diffusers.adjoint import lean_adjoint
from am_diffusers.matching import matching_target
from am_diffusers.rollout import rollout, sample
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import CallableField
from derivatives import SIGMAS, derivatives, divergence, drift, memoryless, states
from oracles import THREE_MODES, chain_moments, float64, gaussian, unconditional
from pull_backs import swept


@pytest.mark.parametrize(("factor", "right"), [(-0.5, True), (0.5, False)])
def test_fokker_planck_with_plus_one_half_does_not_hold(factor, right):
    """Transport by b + factor * diffusion^2 * score: -1/2 gives the marginals, +1/2 doesn't."""

    def transport(x, sigma):
        score = -(x + (1 - sigma[:, None]) * THREE_MODES.velocity(x, sigma)) / sigma[:, None]
        return drift(THREE_MODES, memoryless, x, sigma) + factor * 2 * memoryless(sigma)[:, None] * score

    x = states(THREE_MODES, SIGMAS)
    score, _, by_t = derivatives(THREE_MODES.log_density, x, SIGMAS)
    residual = by_t + divergence(transport, x, SIGMAS) + (transport(x, SIGMAS) * score).sum(1)
    if right:
        assert residual.abs().max() < 1e-9
    else:
        assert residual.abs().median() > 1


@pytest.mark.parametrize(
    ("rate", "noise", "forgets"),
    [
        (lambda s: 1 / (1 - s), lambda s: 2 * s / (1 - s), True),  # the memoryless schedule
        (lambda s: 1.0, lambda s: 2.0, False),
        (lambda s: 0.05 + 2 * s, lambda s: 0.1 + 4 * s, False),  # a variance-preserving process
    ],
)
def test_a_linear_drift_plus_score_is_not_enough_to_be_memoryless(rate, noise, forgets):
    """Reversals of dx = -rate x ds + sqrt(noise) dW on N(0, .3) data, all "linear + noise * score".

    Their ends are correlated by the gain exp(-integral of rate), which is 0 only if that diverges.
    """
    data, end = 0.3, 1 - 1e-7

    def forward(s, y):
        """Variance, gain of the noising process, and gain of the reversal from s to 0."""
        variance, gain, back = y
        reversal = rate(s) - noise(s) / variance  # slope of rate x + noise * score
        return [-2 * rate(s) * variance + noise(s), -rate(s) * gain, reversal * back]

    variance, gain, back = solve_ivp(
        forward, (0, end), [data, 1.0, 1.0], rtol=1e-10, atol=1e-14, method="LSODA"
    ).y[:, -1]
    correlation = back * (variance / data) ** 0.5
    assert correlation == pytest.approx(gain * (data / variance) ** 0.5, abs=1e-8)
    if forgets:
        assert abs(correlation) < 1e-6
        assert variance == pytest.approx(1, abs=1e-6)
    else:
        assert correlation > 0.15


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_terminal_adjoint_with_plus_moves_pictures_to_lower_rewards(sign):
    """Linear reward, Gaussian data: with the minus the mean goes up as it should, with a plus down as far."""
    law, slope, table = gaussian(0.4, 0.3), 0.8, memoryless_local_linear(uniform_sigmas(12))
    cond, x = unconditional(3), float64(-1.0, 0.2, 0.9)[:, None]
    still = torch.zeros_like(x)
    trajectory = rollout(law.field(), table, cond, x, lambda k: still)
    sweep = swept(lean_adjoint, law.field(), trajectory, lambda final: torch.full_like(final, sign * slope))
    shifts = {}
    for k in range(11):
        base, adjoint = sweep.velocity_base[k], sweep.adjoints[k + 1]
        target = matching_target(table, k, velocity_base=base, adjoint_right=adjoint, adjoint_left=None)
        shifts[table.sigmas[k].item()] = target - base
    policy = CallableField(lambda x, sigma, cond: law.velocity(x, sigma) + shifts.get(sigma[0].item(), 0.0))
    tuned, base = (sample(field, table, cond, x, lambda k: still) for field in (policy, law.field()))
    gain = tuned - base
    expected = torch.full_like(gain, -sign * slope * chain_moments(table, law)[1])
    torch.testing.assert_close(gain, expected, rtol=0, atol=1e-10)
    assert gain.abs().min() > 0.15


def test_an_epsilon_not_tied_to_the_step_blows_up_the_first_one():
    """1/t as 1/(t + .001) in an Euler-Maruyama step from t = 0 on SD3's own grid of 28 steps: std 12.7."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    sigma, epsilon, law = scheduler.sigmas[1].item(), 1e-3, gaussian(0.0, 0.5)
    h = 1 - sigma
    truth = math.sqrt(h**2 * 0.5 + sigma**2)
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)[:, None]
    mean = x + h * (-2 * law.velocity(x, 1.0) - x / epsilon)
    gain = (mean[2] - mean[0]).item() / 2
    assert math.sqrt(gain**2 + 2 * h / epsilon) == pytest.approx(12.7, abs=0.05)
    table = memoryless_local_linear(float64(1, sigma, 0))
    mean = table.mean(0, x, law.velocity(x, 1.0))
    gain = (mean[2] - mean[0]).item() / 2
    assert math.sqrt(gain**2 + table.std[0].item() ** 2) == pytest.approx(truth, rel=0.01)


def test_a_log_probability_averaged_over_dimensions_is_none():
    """E[r grad log p] is the gradient of E[r] (REINFORCE) for the sum; the average is short by a factor D.

    Linear reward: products of two noises, whose means corners (+-1)^D have in common with a Gaussian.
    """
    table, k, dim = memoryless_local_linear(uniform_sigmas(6)), 3, 4
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype=torch.float64)
    torch.manual_seed(0)
    x, velocity, slope = torch.randn(3, dim, dtype=torch.float64)
    x_next = table.step(k, x, velocity, corners)
    velocity = velocity.requires_grad_(True)
    log_prob = table.log_prob(k, x_next, x.expand_as(x_next), velocity.expand_as(x_next))
    (gradient,) = torch.autograd.grad(((x_next @ slope) * log_prob).mean(), velocity, retain_graph=True)
    expected = table.v_coef[k] * slope
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    (averaged,) = torch.autograd.grad(((x_next @ slope) * log_prob / dim).mean(), velocity)
    assert (averaged / expected).max() < 0.3

    def mean_ratio(divisor: int) -> float:
        """E[exp((log p_other - log p) / divisor)] by quadrature: 1 for a likelihood ratio."""
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
        where = nodes.expand(dim, -1).T / dim**0.5  # along the shift; across it the ratio is constant
        points = table.step(k, x, velocity.detach(), where)
        other = velocity.detach() + 0.4
        states = x.expand_as(points)
        change = table.log_prob(k, points, states, other.expand_as(points))
        change = change - table.log_prob(k, points, states, velocity.detach().expand_as(points))
        return (weights / weights.sum() @ (change / divisor).exp()).item()

    assert mean_ratio(1) == pytest.approx(1, abs=1e-10)
    assert abs(mean_ratio(dim) - 1) > 0.02


@pytest.mark.parametrize("weighted", [True, False])
def test_importance_weights_that_are_not_used_push_past_the_optimum(weighted):
    """Gradient of E[r] over one step from rows of an older policy, exactly, for r = -(x - goal)^2 / 2.

    With the weights p_new / p_old it is that of the new policy, 0 where its mean is the goal. Without, the
    one at the older policy, however far the new one has gone: it doesn't stop there.
    """
    table, k = memoryless_local_linear(uniform_sigmas(6)), 3
    x, older, velocity = float64(0.3), float64(-1.1), float64(-0.1).requires_grad_(True)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    reached = table.step(k, x, older, nodes)[:, None]  # by the older policy
    states = x.expand_as(reached)

    def log_prob(of_policy):
        return table.log_prob(k, reached, states, of_policy.expand_as(reached))

    def gradient(goal):
        rewards = -0.5 * (reached[:, 0] - goal) ** 2
        mean = weights @ rewards / weights.sum()
        new = log_prob(velocity)
        ratio = (new.detach() - log_prob(older)).exp() if weighted else 1.0
        (found,) = torch.autograd.grad(weights @ (ratio * (rewards - mean) * new) / weights.sum(), velocity)
        return found.item()

    means = {name: table.mean(k, x, v).item() for name, v in (("new", velocity), ("old", older))}
    v_coef, there = table.v_coef[k].item(), "new" if weighted else "old"
    for goal in (0.9, means["new"]):
        assert gradient(goal) == pytest.approx(v_coef * (goal - means[there]), abs=1e-10)
    assert abs(means["new"] - means["old"]) > 0.5 * table.std[k].item()  # far apart
