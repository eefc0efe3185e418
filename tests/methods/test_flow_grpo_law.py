"""The law that Flow-GRPO learns: an affine policy, Gaussian data and a quadratic reward, all in closed form.

The policy is velocity_base + gain_k * x + shift_k at step k. The mean of the method's gradient is taken
without sampling: Gauss-Hermite quadrature with 3 nodes for the start and each step's noise is exact, as the
gradient is of degree 4 in each. Its nodes 0, -sqrt(3), sqrt(3) with weights 2/3, 1/6, 1/6 are six samples.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from am_diffusers.noise import LatentSpec, generator_for, generators_for
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import CallableField
from methods_around import make_method
from oracles import affine, float64, gaussian, unconditional

LAW, BEST = gaussian(0.3, 0.5), 1.5
NODES = (0.0, 0.0, 0.0, 0.0, -math.sqrt(3), math.sqrt(3))


class Step(NamedTuple):
    """A step: mean gain * x + offset under the base, noise, factor of the velocity."""

    gain: float
    offset: float
    std: float
    v_coef: float
    sigma: float


def base_chain(num_steps):
    table, steps = memoryless_local_linear(uniform_sigmas(num_steps)), []
    for k in range(num_steps):
        x_coef, v_coef, std = table.x_coef[k].item(), table.v_coef[k].item(), table.std[k].item()
        slope, intercept = affine(LAW.field(), table.sigmas[k].item())
        steps.append(Step(x_coef + v_coef * slope, v_coef * intercept, std, v_coef, table.sigmas[k].item()))
    return steps


def policy_of(steps, scale, *, price_of_the_rest, slope=None):
    """Gains and shifts (K - 1, 2) of the policy whose step k is best for what follows step k.

    What follows is worth -a / 2 x^2 + b x: the scaled reward alone, or less the path KL of the later steps.
    The best mean is that of the base plus std^2 times the slope of this at it. The reward is
    -(x - BEST)^2 / 2, or slope * x.
    """
    last = steps[-1]
    a = 0.0 if slope else scale * last.gain**2
    b = scale * last.gain * (slope or BEST - last.offset)
    policy = []
    for step in steps[-2::-1]:
        shrink = 1 / (1 + step.std**2 * a)
        gain, offset = step.gain * shrink, (step.offset + step.std**2 * b) * shrink
        policy.append([(gain - step.gain) / step.v_coef, (offset - step.offset) / step.v_coef])
        if price_of_the_rest:
            a, b = a * shrink * step.gain**2, step.gain * shrink * (b - a * step.offset)
        else:
            a, b = a * gain**2, gain * (b - a * offset)
    return torch.tensor(policy[::-1], dtype=torch.float64)


def moments(steps, policy):
    """Mean and variance of the state before each step and of the end; the last step is the base's."""
    mean, variance = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    found = [(mean, variance)]
    for step, (gain, shift) in zip(steps, [*policy, policy.new_zeros(2)], strict=True):
        factor = step.gain + step.v_coef * gain
        mean = factor * mean + step.offset + step.v_coef * shift
        variance = factor**2 * variance + step.std**2
        found.append((mean, variance))
    return found


def objective(steps, policy, scale):
    """The scaled mean reward minus the KL of the paths, exactly."""
    *states, (mean, variance) = moments(steps, policy)
    value = -scale / 2 * ((mean - BEST) ** 2 + variance)
    for step, (gain, shift), (m, v) in zip(steps, policy, states, strict=False):
        value = value - 0.5 * (step.v_coef / step.std) ** 2 * ((gain * m + shift) ** 2 + gain**2 * v)
    return value


class Quadrature(LatentSpec):
    """Latents of the start, then noises step by step, at the nodes of the quadrature."""

    def start(self, num_steps):
        grid = torch.tensor(list(itertools.product(NODES, repeat=num_steps)), dtype=torch.float64)
        object.__setattr__(self, "columns", iter(grid.T[:, :, None]))
        return len(grid)

    def draw(self, generators):
        return next(self.columns)


def mean_gradient(steps, policy, scale, kl_weight):
    """The method's gradient in gains and shifts (K - 1, 2), and the metric of the path KL, (K - 1, 2, 2)."""
    policy = policy.clone().requires_grad_()
    table = memoryless_local_linear(uniform_sigmas(len(steps)))

    def velocity(x, sigma, cond):
        gain, shift = policy[torch.searchsorted(-table.sigmas, -sigma)].T
        return LAW.velocity(x, sigma) + gain[:, None] * x + shift[:, None]

    latents = Quadrature((1,), dtype=torch.float64)
    number = latents.start(len(steps))
    # Advantages are against the mean of the others, which makes them number / (number - 1) times as large.
    method = make_method(
        "flow_grpo",
        CallableField(velocity),
        LAW.field(),
        reward=lambda x, prompts: -0.5 * (x[:, 0] - BEST) ** 2,
        latents=latents,
        num_inference_steps=len(steps),
        reward_scale=scale * (number - 1) / number,
        samples_per_prompt=number,
        grpo_kl_weight=kl_weight,
    )
    cond = unconditional(1).index([0] * number)
    rows = method.collect(cond, generators_for(0, 0, range(number)), generator_for(0, "shared")).examples
    loss, _ = method.loss(rows)
    (gradient,) = torch.autograd.grad(loss, policy)
    features = torch.stack([rows.latents[:, 0], torch.ones(len(rows))], 1)
    ratio = (table.v_coef / table.std)[rows.steps] ** 2 * rows.weight
    products = ratio[:, None, None] * features[:, :, None] * features[:, None]
    metric = torch.stack([products[rows.steps == k].sum(0) for k in range(len(steps) - 1)])
    return gradient, metric


def descend(steps, scale, kl_weight):
    """Where natural gradient descent from the base by the method's mean gradient comes to rest."""
    policy = torch.zeros(len(steps) - 1, 2, dtype=torch.float64)
    for _ in range(60):
        gradient, metric = mean_gradient(steps, policy, scale, kl_weight)
        policy = policy - 0.5 / kl_weight * torch.linalg.solve(metric, gradient)
    return policy


@pytest.mark.parametrize(("scale", "kl_weight"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_flow_grpo_leaves_out_what_later_steps_cost(scale, kl_weight):
    """Exact oracle. Descent ends at the closed form, and not at the optimum of the chain's own cost."""
    steps = base_chain(4)
    found = descend(steps, scale, kl_weight)
    expected = policy_of(steps, scale / kl_weight, price_of_the_rest=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    best = policy_of(steps, scale / kl_weight, price_of_the_rest=True).requires_grad_()
    (slope,) = torch.autograd.grad(objective(steps, best, scale / kl_weight), best)
    assert slope.abs().max() < 1e-12
    assert (found - best).abs().max() > 0.05


def test_flow_grpo_tends_to_half_way_from_the_base_to_the_tilt_of_twice_the_scale():
    """Order 1 in the step, of gains and shifts at sigma = .1 .. .9; SDE and ODE end in different laws."""
    scale, errors = 2.0, []
    twice = LAW.tilted(float64(2 * scale * BEST), curvature=2 * scale)
    for num_steps in (80, 160, 320):
        steps = base_chain(num_steps)
        policy = policy_of(steps, scale, price_of_the_rest=False)
        worst = 0.0
        for step, learned in zip(steps, policy, strict=False):
            if 0.1 <= step.sigma <= 0.9:
                base, tilted = (float64(*affine(law.field(), step.sigma)) for law in (LAW, twice))
                worst = max(worst, (learned - (tilted - base) / 2).abs().max().item())
        errors.append(worst)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    mean, variance = moments(steps, policy)[-1]
    tilted = LAW.tilted(float64(scale * BEST), curvature=scale)
    assert (tilted.mean().item(), tilted.variances.item() ** 0.5) == pytest.approx((0.9, 0.5))
    assert (mean.item(), variance.item() ** 0.5) == pytest.approx((0.81, 0.52), abs=0.005)
    mean, gain = 0.0, 1.0
    for step, (slope, shift) in zip(steps, [*policy.tolist(), (0.0, 0.0)], strict=True):
        base_slope, intercept = affine(LAW.field(), step.sigma)
        factor = 1 - (base_slope + slope) / len(steps)  # an Euler step
        mean, gain = factor * mean - (intercept + shift) / len(steps), factor * gain
    assert (mean, gain) == pytest.approx((0.77, 0.54), abs=0.005)


def test_the_bias_of_flow_grpo_is_of_second_order_in_the_scale_and_none_for_a_linear_reward():
    """Order: log-log slope 2 of the distance to the chain's optimum in mean and variance of the ends."""
    steps, distances = base_chain(20), []
    for scale in (0.01, 0.02, 0.04):
        ends = [
            torch.stack(moments(steps, policy_of(steps, scale, price_of_the_rest=rest))[-1])
            for rest in (False, True)
        ]
        distances.append((ends[0] - ends[1]).abs())
    slopes = torch.log2(torch.stack(distances[1:]) / torch.stack(distances[:-1]))
    assert (slopes - 2).abs().max() < 0.15
    linear = [policy_of(steps, 2.0, price_of_the_rest=rest, slope=0.7) for rest in (False, True)]
    torch.testing.assert_close(linear[0], linear[1], rtol=1e-12, atol=0)


def tilted_mean(values, chances, scale):
    """Log E exp(scale * r), the value of a state from which the rewards `values` (n,) have these chances."""
    return (chances.log() + scale * values).logsumexp(0)


def test_every_cumulant_from_the_second_on_separates_what_flow_grpo_reaches_from_the_tilt():
    """W + V = sum over n >= 2 of (2^(n-1) - 1) kappa_n / n!; order 5 of what the first three terms leave."""
    values, chances, rest = float64(-1.0, 0.5, 2.0), float64(0.3, 0.5, 0.2), []
    centred = values - chances @ values
    second, third, fourth = (chances @ centred**n for n in (2, 3, 4))
    terms = (second / 2, 3 * third / 6, 7 * (fourth - 3 * second**2) / 24)
    for scale in (0.05, 0.025):
        gap = tilted_mean(values, chances, 2 * scale) / 2 - tilted_mean(values, chances, scale)
        rest.append(gap - sum(term * scale**n for n, term in enumerate(terms, 2)))
    assert torch.log2(rest[0] / rest[1]).item() == pytest.approx(5, abs=0.2)


def test_flow_grpo_is_not_exact_where_only_the_variance_does_not_depend_on_the_state():
    """Two rewards of variance 1, with chance p of the higher: W + V depends on p, and not on a shift."""
    gaps = []
    for chance, shift in ((0.2, 0.0), (0.8, 0.0), (0.2, 3.0)):
        spread = (chance * (1 - chance)) ** 0.5
        values, chances = float64(0, 1) / spread + shift, float64(1 - chance, chance)
        assert chances @ values**2 - (chances @ values) ** 2 == pytest.approx(1)
        gaps.append((tilted_mean(values, chances, 1.0) / 2 - tilted_mean(values, chances, 0.5)).item())
    assert gaps[0] - gaps[1] > 0.1
    assert gaps[2] == pytest.approx(gaps[0], rel=1e-12)
