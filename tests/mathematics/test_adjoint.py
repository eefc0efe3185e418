"""Adjoints against autograd through the rollout, and the exact solution for a linear reward."""

import pytest
import torch

from am_diffusers.adjoint import full_adjoint, lean_adjoint, terminal_adjoint
from am_diffusers.matching import matching_target
from am_diffusers.rollout import rollout, sample
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.terminal_cost import reward_gradient
from am_diffusers.transitions import (
    ancestral,
    memoryless_euler,
    memoryless_local_linear,
    shifted_sigmas,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField
from oracles import THREE_MODES, CountingField, chain_moments, gaussian, unconditional
from pull_backs import swept

STOCHASTIC = [memoryless_euler, memoryless_local_linear, ancestral]
BASE = THREE_MODES.field()
SHIFTED = CallableField(lambda x, sigma, cond: THREE_MODES.velocity(x, sigma) - 0.7 * sigma[:, None])
POLICY = CallableField(lambda x, sigma, cond: THREE_MODES.velocity(x, sigma) + torch.sin(2 * x).flip(1))
COND = unconditional(5)
REWARD_SCALE = 1.7


def reward(x, prompts):
    return torch.sin(2 * x[:, 0]) - (x[:, 1] - 0.5) ** 2 * x[:, 0]


def terminal(final):
    return terminal_adjoint(reward_gradient(reward, final, COND.prompts)[1], REWARD_SCALE)


@pytest.fixture
def noises():
    torch.manual_seed(0)
    return torch.randn(7, 5, 2, dtype=torch.float64)


def state_cost(x, sigma, cond):
    return sigma * torch.cos(3 * x[:, 0] * x[:, 1]) + x[:, 1] ** 2


def cost_to_go(table, k, x, field, noises, *, running_cost, state_cost=None):
    """Cost of the rest of the chain from x_k, with the noise fixed: path KL if asked for, and -reward."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for j in range(k, table.num_steps):
        follow = field if j < table.num_steps - 1 else BASE
        sigma = table.sigmas[j].expand(len(x))
        velocity = follow(x, sigma, COND)
        if running_cost:
            total = total + table.path_kl(j, velocity, BASE(x, sigma, COND))
        if state_cost is not None:
            total = total + (table.sigmas[j] - table.sigmas[j + 1]) * state_cost(x, sigma, COND)
        x = table.step(j, x, velocity, noises[j])
    return total - REWARD_SCALE * reward(x, COND.prompts)


def assert_adjoints_are_gradients(sweep, trajectory, field, noises, *, running_cost, state_cost=None):
    table = trajectory.transitions
    states = [*trajectory.latents, sweep.final]
    assert sorted(sweep.adjoints) == list(range(1, table.num_steps + 1))
    for k, adjoint in sweep.adjoints.items():
        x = states[k].clone().requires_grad_(True)
        cost = cost_to_go(table, k, x, field, noises, running_cost=running_cost, state_cost=state_cost)
        torch.testing.assert_close(adjoint, torch.autograd.grad(cost.sum(), x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cost", [None, state_cost])
@pytest.mark.parametrize("build", STOCHASTIC)
@pytest.mark.parametrize("policy", [BASE, SHIFTED])
def test_lean_adjoint_is_the_gradient_through_the_rollout_of_the_base_or_of_a_constant_shift(
    build, policy, cost, noises
):
    table = build(shifted_sigmas(6, 3.0))
    trajectory = rollout(policy, table, COND, noises[6], lambda k: noises[k])
    sweep = swept(lean_adjoint, BASE, trajectory, terminal, state_cost=cost)
    assert_adjoints_are_gradients(sweep, trajectory, policy, noises, running_cost=False, state_cost=cost)


@pytest.mark.parametrize("cost", [None, state_cost])
@pytest.mark.parametrize("build", STOCHASTIC)
def test_full_adjoint_is_the_gradient_of_all_costs_through_the_policy(build, cost, noises):
    table = build(uniform_sigmas(6))
    trajectory = rollout(POLICY, table, COND, noises[6], lambda k: noises[k])
    sweep = swept(full_adjoint, BASE, trajectory, terminal, POLICY, state_cost=cost)
    assert_adjoints_are_gradients(sweep, trajectory, POLICY, noises, running_cost=True, state_cost=cost)
    lean = swept(lean_adjoint, BASE, trajectory, terminal, state_cost=cost)
    assert not torch.allclose(lean.adjoints[1], sweep.adjoints[1], rtol=0.01)


@pytest.mark.parametrize("build", STOCHASTIC)
def test_the_sweep_supplies_base_velocities_and_the_last_step(build, noises):
    table = build(uniform_sigmas(4))
    trajectory = rollout(POLICY, table, COND, noises[6], lambda k: noises[k])
    sweep = swept(lean_adjoint, BASE, trajectory, terminal)
    for k in range(4):
        expected = THREE_MODES.velocity(trajectory.latents[k], table.sigmas[k])
        torch.testing.assert_close(sweep.velocity_base[k], expected, rtol=0, atol=1e-12)
    clean = trajectory.latents[3] - 0.25 * sweep.velocity_base[3]
    torch.testing.assert_close(sweep.final, clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", STOCHASTIC)
def test_linear_reward_on_gaussian_data_is_solved_exactly_given_the_start(build, noises):
    """The optimum shifts the mean of x_K given x_0 by reward_scale * variance of x_K given x_0.

    Both belong to the chain of the table: the discrete chain's own variance, not the data's, and
    conditional on x_0, because the local-linear table is memoryless only up to 1/K^2. The velocity is
    affine in x, so the mean of a chain is the chain without noise.
    """
    law, slope, table = gaussian(0.4, 0.3), 0.8, build(uniform_sigmas(7))
    base, x_0, cond = law.field(), noises[6, :, :1], COND
    quiet = torch.zeros_like(x_0)
    trajectory = rollout(base, table, cond, x_0, lambda k: noises[k, :, :1])
    sweep = swept(lean_adjoint, base, trajectory, lambda final: torch.full_like(final, -REWARD_SCALE * slope))

    def mean_of_optimum(pairing):
        shift = {}
        for k in range(6):
            target = matching_target(
                table,
                k,
                velocity_base=sweep.velocity_base[k],
                adjoint_right=sweep.adjoints[k + 1],
                adjoint_left=sweep.adjoints.get(k),
                pairing=pairing,
            )
            shift[round(table.sigmas[k].item(), 9)] = target - sweep.velocity_base[k]
        policy = CallableField(
            lambda x, sigma, cond: base(x, sigma, cond) + shift.get(round(sigma[0].item(), 9), 0.0)
        )
        return sample(policy, table, cond, x_0, lambda k: quiet)

    base_mean = sample(base, table, cond, x_0, lambda k: quiet)
    expected = base_mean + REWARD_SCALE * slope * chain_moments(table, law)[1]
    torch.testing.assert_close(mean_of_optimum("right"), expected, rtol=0, atol=1e-10)
    assert (mean_of_optimum("left") - expected).abs().min() > 0.01  # the test tells the pairings apart


@pytest.mark.parametrize("with_left", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("kind", ["lean", "full"])
def test_a_sweep_stops_at_the_first_step_that_is_wanted(kind, first, with_left, noises):
    """No pass before it; what is reached is bit for bit what the whole sweep has."""
    base, policy = CountingField(BASE), CountingField(POLICY)
    trajectory = rollout(
        policy, memoryless_local_linear(uniform_sigmas(4)), COND, noises[6], lambda k: noises[k]
    )
    adjoint, fields = (lean_adjoint, ()) if kind == "lean" else (full_adjoint, (policy,))
    whole = swept(adjoint, BASE, trajectory, terminal, *([POLICY] if fields else []), with_left=True)
    found = swept(adjoint, base, trajectory, terminal, *fields, first=first, with_left=with_left)
    pulled = [1 - k / 4 for k in (3, 2, 1, 0) if k + with_left > first]
    assert (base.vjps, base.calls) == (pulled, [] if with_left else [1 - first / 4])
    assert policy.vjps == (pulled[1:] if fields else [])
    assert sorted(found.adjoints) == list(range(first + 1 - with_left, 5))
    assert sorted(found.velocity_base) == list(range(first, 4))
    for part in ("adjoints", "velocity_base"):
        assert all(torch.equal(value, getattr(whole, part)[k]) for k, value in getattr(found, part).items())


def test_a_field_that_blows_up_is_reported_with_step_sigma_and_prompt(noises):
    def explode(x, sigma, cond):
        rows = torch.tensor([prompt == "prompt 1" for prompt in cond.prompts])[:, None]
        return torch.where(rows & (sigma[:, None] == 0.5), x * 1e200, x)

    trajectory = rollout(
        BASE, memoryless_local_linear(uniform_sigmas(4)), COND, noises[6], lambda k: noises[k]
    )
    with pytest.raises(NonFiniteError, match=r"step 2 \(sigma 0.5000\).*\['prompt 1'\]"):
        swept(lean_adjoint, CallableField(explode), trajectory, lambda final: 1e200 * terminal(final))
