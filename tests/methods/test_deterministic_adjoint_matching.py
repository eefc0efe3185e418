"""Deterministic Adjoint Matching: passes, adjoints, costs, and the law it learns, which isn't the tilt."""

import math

import pytest
import torch

from am_diffusers.adjoint import lean_adjoint
from am_diffusers.methods.deterministic_adjoint_matching import DeterministicAdjointMatching, optimal_control
from am_diffusers.noise import LatentSpec, generators_for
from am_diffusers.rollout import rollout, sample
from am_diffusers.transitions import ode_euler, shifted_sigmas, uniform_sigmas
from am_diffusers.velocity import CallableField
from method_training import linear_policy, train
from methods_around import BASE, LATENTS, OFFSET, collect, make_method, total_loss
from methods_around import concave as reward
from methods_around import deterministic as make
from oracles import THREE_MODES, CountingField, affine, float64, gaussian, unconditional

SIGMAS = shifted_sigmas(8, 3.0)
TABLE = ode_euler(SIGMAS)


def make_plain(policy, base, **given):
    """The method on a uniform grid, by its defaults."""
    return make_method("deterministic_adjoint_matching", policy, base, **given)


# ---------------------------------------------------------------------------------- passes and adjoints


@pytest.mark.parametrize("steps", [1, 3, None])
def test_no_pass_is_wasted(steps):
    grid, trained = SIGMAS.tolist(), steps or 8
    policy, base = CountingField(OFFSET), CountingField(BASE)
    method = make(policy, base, truncate_steps=steps)
    examples = collect(method).examples
    assert policy.calls == grid[:8]
    assert base.vjps == grid[7 : 8 - trained : -1]
    assert base.calls == [grid[8 - trained]]
    assert sorted(set(examples.sigmas.tolist()), reverse=True) == grid[8 - trained : 8]
    for part in examples.split(5):
        method.loss(part)
    assert len(policy.calls) - 8 == -(-6 * trained // 5)
    assert policy.vjps == []
    policy, other = CountingField(OFFSET), CountingField(BASE)
    collect(make(policy, rollout=other, truncate_steps=steps))
    assert other.calls == grid[:8]
    assert policy.calls == grid[8 - trained : 8]


def test_adjoints_of_the_last_steps_are_the_gradients_of_the_rest_of_the_rollout():
    """Derivative, 1e-12: with the base as policy, adjoint_k is that of the reward of the rest of its ODE."""
    cond, noise = unconditional(5), LATENTS.draw(generators_for(0, 0, range(5)))
    trajectory = rollout(BASE, TABLE, cond, noise, lambda _: noise)
    final = sample(BASE, TABLE, cond, noise).requires_grad_(True)
    (gradient,) = torch.autograd.grad(-2.0 * reward(final, cond.prompts).sum(), final)
    sweep = lean_adjoint(BASE, trajectory, gradient, 8, first=4)
    assert sorted(sweep.adjoints) == [5, 6, 7, 8]
    assert sorted(sweep.velocity_base) == [4, 5, 6, 7]
    for k in (5, 6, 7):
        x = start = trajectory.latents[k].clone().requires_grad_(True)
        for j in range(k, 8):
            x = TABLE.mean(j, x, THREE_MODES.velocity(x, SIGMAS[j]))
        (expected,) = torch.autograd.grad(-2.0 * reward(x, cond.prompts).sum(), start)
        torch.testing.assert_close(sweep.adjoints[k], expected, rtol=0, atol=1e-12)
    for k in (4, 7):
        torch.testing.assert_close(sweep.velocity_base[k], BASE(*trajectory.at(k)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cost_power", [1.3, 2.0, 3.0])
def test_controls_minimise_their_cost(cost_power):
    """Identity: the gradient |u|^{q-2} u + a of |u|^q / q + a . u is zero; no control without adjoint."""
    a = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = optimal_control(a, cost_power).requires_grad_(True)
    cost = u.flatten(1).norm(dim=1) ** cost_power / cost_power + (a * u).flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(cost.sum(), u)
    torch.testing.assert_close(gradient, torch.zeros_like(a), rtol=0, atol=1e-12)
    zero = torch.zeros(2, 3, dtype=torch.float32)
    assert torch.equal(optimal_control(zero, cost_power), zero)


@pytest.mark.parametrize("cost_power", [2.0, 3.0])
def test_rows_are_what_the_formulas_say(cost_power):
    method, num = make(cost_power=cost_power), 6
    collected = collect(method, num=num)
    batch, cond = collected.examples, unconditional(num)
    noise = LATENTS.draw(generators_for(0, 0, range(num)))
    trajectory, final = (
        rollout(OFFSET, TABLE, cond, noise, lambda _: noise),
        sample(OFFSET, TABLE, cond, noise),
    )
    end = final.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(-2.0 * reward(end, cond.prompts).sum(), end)
    sweep = lean_adjoint(BASE, trajectory, gradient, 8, first=5)
    k = torch.searchsorted(-SIGMAS, -batch.sigmas).tolist()
    assert k == [5, 6, 7] * num
    latents, target, cost = [], [], 0.0
    for step, row in zip(k, batch.samples.tolist(), strict=True):
        u = optimal_control(sweep.adjoints[step + 1], cost_power)[row]
        latents.append(trajectory.latents[step, row])
        target.append(sweep.velocity_base[step][row] - u)
        change = OFFSET(*trajectory.at(step))[row] - sweep.velocity_base[step][row]
        cost += (SIGMAS[step] - SIGMAS[step + 1]).item() * change.norm().item() ** cost_power / cost_power
    torch.testing.assert_close(batch.latents, torch.stack(latents), rtol=0, atol=1e-12)
    torch.testing.assert_close(batch.target, torch.stack(target), rtol=0, atol=1e-12)
    weight = -SIGMAS.diff()[k] / (num * 3)
    torch.testing.assert_close(batch.weight, weight, rtol=1e-12, atol=0)
    assert collected.metrics["control_cost"] == pytest.approx(cost / num, rel=1e-12)
    assert collected.metrics["reward"] == pytest.approx(reward(final, cond.prompts).mean().item(), rel=1e-12)
    norms = [name for name in collected.metrics if "/" in name]
    assert norms == [f"adjoint_norm/{k:02d}" for k in (6, 7, 8)]


# ------------------------------------------------------------------------------- masks, wrong settings


@pytest.mark.parametrize("rollout_field", [None, BASE])
def test_masked_rows_leave_loss_and_denominator(rollout_field):
    method = make(mask_quantile=0.7, rollout=rollout_field)
    kept = collect(method, num=20)
    assert kept.metrics["masked"] == pytest.approx(1 - len(kept.examples) / 60)
    assert 0.25 < kept.metrics["masked"] < 0.35
    rows = collect(make(rollout=rollout_field), num=20).examples
    residuals = rows.weight * 60 * (OFFSET(rows.latents, rows.sigmas, None) - rows.target).square().sum(1)
    thresholds = method.state_dict()["mask"]
    limit = float64(*[thresholds[str(k)] for k in torch.searchsorted(-SIGMAS, -rows.sigmas).tolist()])
    expected = residuals[residuals.sqrt() <= limit].mean().item()
    assert total_loss(method, kept) == pytest.approx(expected, rel=1e-10)


def test_wrong_settings_are_errors():
    for wrong, match in (
        ({"reward_scale": 0.0}, "--reward_scale must be positive"),
        ({"cost_power": 1.0}, "--cost_power must be above 1, for a convex cost, got 1.0"),
        ({"truncate_steps": 0}, "--truncate_steps must be at least 1"),
        ({"truncate_steps": 9}, "--truncate_steps must be from 1 to num_inference_steps, 8, or null.*got 9"),
    ):
        with pytest.raises(ValueError, match=match):
            make(**wrong)
    assert not DeterministicAdjointMatching.aims_at_tilt


# ------------------------------------------------------------------------------------- the law learned


def shifted_ends(variance, num_steps, cost_power, scale):
    """Mean shift and factor of the std of the ends, for a linear reward on N(.3, variance), exactly.

    The adjoint of a linear reward doesn't depend on the state, so the targets of one trajectory tell the
    velocity that is learned everywhere.
    """
    law, grid = gaussian(0.3, variance), uniform_sigmas(num_steps)
    base = law.field()
    method = make_plain(
        base,
        base,
        reward=lambda x, prompts: x[:, 0],
        latents=LatentSpec((1,), dtype=torch.float64),
        num_inference_steps=num_steps,
        reward_scale=scale,
        mask_quantile=None,
        cost_power=cost_power,
    )
    batch = collect(method, num=1).examples
    shift = batch.target - law.velocity(batch.latents, batch.sigmas)

    def learned(x, sigma, cond):
        return base(x, sigma, cond) + shift[torch.searchsorted(-grid, -sigma)]

    x = float64(0.0, 1.0)[:, None]
    ends, base_ends = (
        sample(field, ode_euler(grid), unconditional(2), x)[:, 0] for field in (CallableField(learned), base)
    )
    moved = ends - base_ends
    return moved[0].item(), ((ends[1] - ends[0]) / (base_ends[1] - base_ends[0])).item()


@pytest.mark.parametrize("std", [0.2, 1.0, 2.0])
def test_a_linear_reward_moves_every_picture_by_pi_over_two_times_the_std(std):
    """Order 1 in the step: c = std * pi / 2, where the tilt moves by std^2; the spread stays."""
    scale, expected = 0.7, 0.7 * std * math.pi / 2
    errors = []
    for num_steps in (100, 200):
        moved, spread = shifted_ends(std**2, num_steps, 2.0, scale)
        assert spread == pytest.approx(1, rel=1e-12)
        errors.append(abs(moved - expected))
    assert errors[1] < 0.03 * expected
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert abs(expected - scale * std**2) > 0.2 * scale * std**2


@pytest.mark.parametrize("cost_power", [1.5, 3.0])
def test_other_costs_move_by_the_integral_of_the_gains(cost_power):
    """S |lambda S|^{1/(q-1)} times the integral over t of g_t^{-q/(q-1)}, g_t^2 = t^2 S^2 + (1-t)^2."""
    std, scale, conjugate = 0.7, 1.3, cost_power / (cost_power - 1)
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    integral = ((t * std) ** 2 + (1 - t) ** 2).pow(-conjugate / 2).mean().item()
    expected = std * (scale * std) ** (1 / (cost_power - 1)) * integral
    errors = [abs(shifted_ends(std**2, n, cost_power, scale)[0] - expected) for n in (200, 400)]
    assert errors[1] < 0.03 * expected
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def test_training_with_a_quadratic_reward_reaches_the_proximal_map_and_not_the_tilt():
    """Exact to 1e-5, the regression being free of noise: the proximal map of the discrete chain.

    Its c is 3 % from std * pi / 2 at K = 40.
    """
    law, table = gaussian(0.3, 0.5), ode_euler(uniform_sigmas(40))
    policy, weights = linear_policy(law, table)
    method = make_plain(
        policy,
        law.field(),
        reward=lambda x, prompts: -0.5 * (x[:, 0] - 1) ** 2,
        latents=LatentSpec((1,), dtype=torch.float64),
        num_inference_steps=40,
        mask_quantile=None,
    )
    train(method, [weights], num_samples=32, iterations=300, lr=0.1)
    x = float64(0.0, 1.0)[:, None]
    learned, base = (sample(f, table, unconditional(2), x)[:, 0].tolist() for f in (policy, law.field()))
    slopes = float64(*[affine(law.field(), sigma)[0] for sigma in table.sigmas[:-1].tolist()])
    gains = (1 + table.v_coef * slopes).flip(0).cumprod(0).flip(0)
    c = -(table.v_coef * torch.cat([gains[1:], float64(1.0)]) ** 2).sum().item()
    assert c == pytest.approx(math.sqrt(0.5) * math.pi / 2, rel=0.04)
    expected = [(end + 2 * c * 1) / (1 + 2 * c) for end in base]
    assert learned == pytest.approx(expected, rel=1e-5)
    tilted = law.tilted(float64(2.0), curvature=2.0)
    assert learned[1] - learned[0] < 0.5 * tilted.variances.item() ** 0.5


@pytest.mark.parametrize("steps", [1, 4, None])
def test_a_linear_reward_goes_up(steps):
    """32 samples, the same noise before and after: reward differences are the policy's alone."""
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    method = make_plain(
        CallableField(lambda x, sigma, cond: BASE(x, sigma, cond) + shift),
        BASE,
        reward=lambda x, prompts: x[:, 0],
        truncate_steps=steps,
    )
    rewards = train(method, [shift], num_samples=32, iterations=30, lr=0.1)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.5
    assert shift[0] < 0  # a velocity points from clean to noise
