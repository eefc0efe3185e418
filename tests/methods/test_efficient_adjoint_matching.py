"""Efficient Adjoint Matching: passes, rows, and the law it learns, in closed form and by training."""

import pytest
import torch

from am_diffusers.methods.parts.linear_base import linear_target, renoised_score
from am_diffusers.noise import LatentSpec, generators_for
from am_diffusers.parametrization import clean_from_velocity, interpolate, score_from_velocity
from am_diffusers.rollout import sample, sample_ode
from am_diffusers.transitions import ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField
from method_training import train
from methods_around import BASE, LATENTS, OFFSET, collect, total_loss
from methods_around import concave as reward
from methods_around import efficient as make
from oracles import CountingField, affine, float64, gaussian, unconditional

SCORES = ("renoised", "stopped")


# ------------------------------------------------------------------------------------ passes and rows


@pytest.mark.parametrize("score", SCORES)
def test_no_pass_is_wasted(score):
    policy, base = CountingField(OFFSET), CountingField(BASE)
    method = make(policy, base, eam_score=score, eam_sigma=0.1)
    examples = collect(method).examples
    lowest = 0.1 if score == "stopped" else 0.0
    nodes = lowest + (1 - lowest) * uniform_sigmas(6)[:-1]
    assert policy.calls == pytest.approx(nodes.tolist())
    assert base.calls == ([] if lowest else [0.1])
    assert base.vjps == pytest.approx([lowest] if lowest else [])
    for part in examples.split(5):
        method.loss(part)
    assert len(policy.calls) - 6 == -(-6 * 4 // 5)
    assert policy.vjps == []
    other = CountingField(BASE)
    collect(make(CountingField(OFFSET), rollout=other, eam_score=score))
    assert len(other.calls) == 6


@pytest.mark.parametrize("score", SCORES)
def test_rows_are_what_the_formulas_say(score):
    """Noises are drawn again in the same order; the target of each row is put together from its parts."""
    method, num = make(eam_score=score, eam_sigma=0.2, eam_c=0.3, eam_max_weight=5.0), 6
    batch = collect(method, num=num).examples
    generators, cond = generators_for(0, 0, range(num)), unconditional(num)
    noise, lowest = LATENTS.draw(generators), 0.2 if score == "stopped" else 0.0
    end = sample_ode(OFFSET, lowest + (1 - lowest) * uniform_sigmas(6), cond, noise)
    x = end if lowest else interpolate(end, LATENTS.draw(generators), 0.2)
    sigma = x.new_full((num,), 0.2)
    x = x.clone().requires_grad_(True)
    velocity = BASE(x, sigma, cond)
    if score == "stopped":
        value = reward(clean_from_velocity(x, 0.2, velocity), cond.prompts)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        estimate = score_from_velocity(x, 0.2, velocity).detach()
    else:
        clean = end.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(reward(clean, cond.prompts).sum(), clean)
        estimate = renoised_score(x, 0.2, velocity).detach()
    rows = batch.samples
    expected = linear_target(
        batch.latents,
        batch.sigmas,
        end[rows],
        lowest,
        score=estimate[rows],
        adjoint=-2.0 * gradient[rows],
        variance=0.3,
    )
    torch.testing.assert_close(batch.target, expected, rtol=1e-10, atol=1e-10)
    weight = (2 * (1 - batch.sigmas) / batch.sigmas).clamp(max=5) / 6 / (num * 4)
    torch.testing.assert_close(batch.weight, weight, rtol=1e-12, atol=0)
    assert rows.tolist() == [i for i in range(num) for _ in range(4)]
    part = ((1 - batch.sigmas) / (1 - lowest) * 4).long().reshape(num, 4)
    assert part.tolist() == [[0, 1, 2, 3]] * num
    distance = (OFFSET(batch.latents, batch.sigmas, None) - batch.target).square().sum(1)
    assert total_loss(method, collect(method)) == pytest.approx((weight * distance).sum().item(), rel=1e-12)


def test_metrics_and_wrong_input():
    metrics = collect(make(eam_score="renoised")).metrics
    assert set(metrics) == {
        *("reward", "reward_std", "reward_gradient_norm", "reward_slope", "adjoint_norm", "score_norm")
    }
    assert metrics["adjoint_norm"] == pytest.approx(2 * metrics["reward_gradient_norm"])
    for name, wrong in (
        ("eam_c", 0.0),
        ("eam_sigma", 1.0),
        ("eam_score", "exact"),
        ("eam_rows", 0),
        ("reward_scale", -1.0),
    ):
        with pytest.raises(ValueError, match=f"--{name} must be .*, got {wrong}"):
            make(**{name: wrong})


# ----------------------------------------------------------------------------------- the law learned

LAW, SCALE, GOAL = gaussian(0.3, 0.5), 2.0, 1.0  # tilted by exp(-SCALE (x - GOAL)^2 / 2)
TILTED = (0.65, 0.5)
SIGMA = 0.1


def piecewise(nodes, coefficients):
    """Velocity a(sigma) x + b(sigma), linear in sigma between `nodes` (decreasing), (n, 2)."""

    def velocity(x, sigma, cond):
        place = torch.searchsorted(-nodes, -sigma.contiguous()).clamp(1, len(nodes) - 1)
        share = ((nodes[place - 1] - sigma) / (nodes[place - 1] - nodes[place]))[:, None]
        a, b = torch.lerp(coefficients[place - 1], coefficients[place], share).split(1, dim=1)
        return a * x + b

    return CallableField(velocity)


def end_law(field, sigmas, solver):
    """Mean and std of the end of an affine field's ODE, through the solver itself."""
    x = float64(0.0, 1.0)[:, None]
    if solver == "euler":
        at_0, at_1 = sample(field, ode_euler(sigmas), unconditional(2), x)[:, 0].tolist()
    else:
        at_0, at_1 = sample_ode(field, sigmas, unconditional(2), x)[:, 0].tolist()
    return at_0, at_1 - at_0


def regressed(law, nodes, score, variance):
    """Slopes and intercepts (n, 2) of E[target | x_s] for starts from a law: a regression's optimum."""
    stop = SIGMA if score == "stopped" else 0.0
    mean, spread = law
    sigma, x = nodes.repeat(2)[:, None], float64(0.0, 1.0).repeat_interleave(len(nodes))[:, None]
    ratio = (1 - sigma) / (1 - stop)
    gain = ratio * spread**2 / (ratio**2 * spread**2 + sigma**2 - (ratio * stop) ** 2)
    start = mean + gain * (x - ratio * mean)
    # All is linear, so that means of starts give means of scores and gradients.
    at = start if stop else (1 - SIGMA) * start
    slope, intercept = affine(LAW.field(), SIGMA)
    velocity = slope * at + intercept
    if stop:
        estimate, seen = score_from_velocity(at, SIGMA, velocity), at - SIGMA * velocity
        gradient = (1 - SIGMA * slope) * (GOAL - seen)
    else:
        estimate, gradient = renoised_score(at, SIGMA, velocity), GOAL - start
    at_0, at_1 = linear_target(
        x, sigma[:, 0], start, stop, score=estimate, adjoint=-SCALE * gradient, variance=variance
    ).reshape(2, -1)
    return torch.stack([at_1 - at_0, at_0], 1)


def learned_law(*, num_steps, variance, score="renoised", solver="ab2", rounds=400):
    """Mean and std that repeated sampling and regression converge to, without Monte Carlo."""
    stop = SIGMA if score == "stopped" else 0.0
    sigmas = stop + (1 - stop) * uniform_sigmas(num_steps)
    nodes = sigmas[:-1]
    ab = torch.tensor([affine(LAW.field(), s) for s in nodes.tolist()], dtype=torch.float64)
    for _ in range(rounds):
        law = end_law(piecewise(nodes, ab), sigmas, solver)
        ab = torch.lerp(ab, regressed(law, nodes, score, variance), 0.5)
    if stop:
        slope, intercept = affine(LAW.field(), stop)
        law = (law[0] - stop * (slope * law[0] + intercept), (1 - stop * slope) * law[1])
    return law


@pytest.mark.parametrize("score", SCORES)
def test_the_law_learned_is_the_tilt_up_to_the_solver_and_the_score(score):
    """Exact fixed point: 1.5 % at 20 steps, of which sigma = .1 makes .7 %."""
    assert learned_law(num_steps=20, variance=0.1, score=score) == pytest.approx(TILTED, rel=0.015)


def test_few_euler_steps_would_collapse_the_spread():
    """Why the ODE is solved to second order: the error is distilled again and again, more with a small C."""
    laws = {
        (solver, c): learned_law(num_steps=10, variance=c, solver=solver)[1]
        for solver in ("euler", "ab2")
        for c in (0.05, 0.5)
    }
    assert laws["euler", 0.05] == pytest.approx(0.34, abs=0.01)
    assert laws["ab2", 0.05] == pytest.approx(0.48, abs=0.01)
    assert laws["euler", 0.05] < laws["euler", 0.5] < 0.46 < laws["ab2", 0.05] < laws["ab2", 0.5] < 0.5


@pytest.mark.parametrize("score", SCORES)
def test_a_linear_reward_goes_up(score):
    """64 samples of standard deviation ~1: the gain is above half the tilt's, 2 * variance."""
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    method = make(
        CallableField(lambda x, sigma, cond: BASE(x, sigma, cond) + shift),
        BASE,
        reward=lambda x, prompts: x[:, 0],
        eam_ode_steps=8,
        eam_c=0.2,
        eam_score=score,
        eam_sigma=0.1,
    )
    rewards = train(method, [shift], num_samples=64, iterations=30, lr=0.05)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.5
    assert shift[0] < 0  # a velocity points from clean to noise


@pytest.mark.parametrize("score", SCORES)
def test_training_on_a_gaussian_with_a_quadratic_reward_reaches_the_law_learned(score):
    """Within 3 % of the tilted mean and std (the fixed point is 1.5 % off, the rest is noise of the rows)."""
    nodes = torch.cat([uniform_sigmas(10), float64(-1e-9)])[:-1]
    weights = torch.zeros(len(nodes), 2, dtype=torch.float64, requires_grad=True)
    correction = piecewise(nodes, weights)
    field = LAW.field()
    policy = CallableField(lambda x, sigma, cond: field(x, sigma, cond) + correction(x, sigma, cond))
    method = make(
        policy,
        field,
        reward=lambda x, prompts: -0.5 * (x[:, 0] - GOAL) ** 2,
        latents=LatentSpec((1,), dtype=torch.float64),
        reward_scale=SCALE,
        eam_ode_steps=20,
        eam_c=0.2,
        eam_score=score,
        eam_sigma=SIGMA,
        eam_rows=8,
    )
    train(method, [weights], num_samples=128, iterations=200, lr=0.05)
    learned = end_law(policy, uniform_sigmas(80), "ab2")
    assert learned == pytest.approx(TILTED, rel=0.03)
