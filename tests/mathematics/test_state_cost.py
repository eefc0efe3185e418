"""Stochastic control with a running cost of the states, against the exact linear-quadratic solution."""

from dataclasses import dataclass

import pytest
import torch

from am_diffusers.adjoint import full_adjoint, lean_adjoint
from am_diffusers.matching import matching_target
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import rollout
from am_diffusers.transitions import (
    Transitions,
    ancestral,
    memoryless_euler,
    memoryless_local_linear,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField
from methods_around import adjoint_matching, collect
from oracles import affine, gaussian, unconditional
from pull_backs import swept

LAW = gaussian(0.4, 0.3)
BASE = LAW.field()
REWARD_SCALE, CENTRE, STATE_WEIGHT = 1.7, 1.2, 3.0


def reward(x, prompts):
    return -0.5 * (x[:, 0] - CENTRE) ** 2


def state_cost(x, sigma, cond):
    """A quarter more at high noise, so that a wrong step or noise level shows."""
    return 0.5 * STATE_WEIGHT * (1 + 0.25 * sigma) * (x[:, 0] + 0.3) ** 2


def terminal(final):
    return REWARD_SCALE * (final - CENTRE)


@dataclass(frozen=True)
class Chain:
    """Mean a x + b and std of each step of the base, and the solution: cost-to-go P x^2 / 2 + l x by k.

    The control moves the mean by d at a cost d^2 / (2 std^2). With (P, l) of step k + 1 and m = a x + b,
    d = -std^2 (P m + l) / (1 + std^2 P): a Riccati recursion.
    """

    table: Transitions
    curvature: dict[int, float]
    slope: dict[int, float]
    optimum: dict[int, tuple[float, float]]  # velocity = first * x + second

    @classmethod
    def solve(cls, table: Transitions) -> "Chain":
        last = table.num_steps - 1
        curvature, slope = {last + 1: REWARD_SCALE}, {last + 1: -REWARD_SCALE * CENTRE}
        optimum = {}
        for k in range(last, -1, -1):
            v_slope, v_intercept = affine(BASE, table.sigmas[k].item())
            x_coef, v_coef, std = (c[k].item() for c in (table.x_coef, table.v_coef, table.std))
            a, b = x_coef + v_coef * v_slope, v_coef * v_intercept
            p, q = curvature[k + 1], slope[k + 1]
            shrink = 1 / (1 + std**2 * p)
            weight = (table.sigmas[k] - table.sigmas[k + 1]).item()
            weight *= STATE_WEIGHT * (1 + 0.25 * table.sigmas[k].item())
            curvature[k] = weight + a**2 * p * shrink
            slope[k] = 0.3 * weight + a * (q + p * b) * shrink
            d = -(std**2) * p * a * shrink, -(std**2) * (p * b + q) * shrink
            optimum[k] = v_slope + d[0] / v_coef, v_intercept + d[1] / v_coef
        return cls(table, curvature, slope, optimum)

    def policy(self) -> CallableField:
        index = {round(sigma, 9): k for k, sigma in enumerate(self.table.sigmas.tolist())}

        def velocity(x, sigma, cond):
            first, second = self.optimum[index[round(sigma[0].item(), 9)]]
            return first * x + second

        return CallableField(velocity)


@pytest.mark.parametrize("kind", ["lean", "full"])
@pytest.mark.parametrize("build", [memoryless_euler, memoryless_local_linear, ancestral])
def test_the_exact_linear_quadratic_control_is_the_fixed_point(build, kind):
    """All is affine: without noise, trajectories, adjoints and targets are their conditional means."""
    chain = Chain.solve(build(uniform_sigmas(9)))
    table, policy, cond = chain.table, chain.policy(), unconditional(4)
    x_0 = torch.linspace(-2, 2, 4, dtype=torch.float64)[:, None]
    trajectory = rollout(policy, table, cond, x_0, lambda k: torch.zeros_like(x_0))
    fields = () if kind == "lean" else (policy,)
    sweep = {"lean": lean_adjoint, "full": full_adjoint}[kind]
    found = swept(sweep, BASE, trajectory, terminal, *fields, state_cost=state_cost)
    without = swept(sweep, BASE, trajectory, terminal, *fields)
    for k in range(1, table.num_steps):
        expected = chain.curvature[k] * trajectory.latents[k] + chain.slope[k]
        torch.testing.assert_close(found.adjoints[k], expected, rtol=0, atol=1e-10)
        assert (without.adjoints[k] - expected).abs().max() > 0.01
    for k in range(table.num_steps - 1):
        target = matching_target(
            table,
            k,
            velocity_base=found.velocity_base[k],
            adjoint_right=found.adjoints[k + 1],
            adjoint_left=None,
        )
        torch.testing.assert_close(target, policy(*trajectory.at(k)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["lean", "full"])
def test_adjoint_matching_passes_the_state_cost_on(kind):
    """At the exact control, targets average to its velocities: within 4 standard errors, 4000 samples."""
    num, chain = 4000, Chain.solve(memoryless_local_linear(uniform_sigmas(6)))
    policy = chain.policy()
    method = adjoint_matching(
        policy,
        BASE,
        reward=reward,
        latents=LatentSpec((1,), dtype=torch.float64),
        state_cost=state_cost,
        num_inference_steps=6,
        reward_scale=REWARD_SCALE,
        adjoint=kind,
        mask_quantile=None,
    )
    collected = collect(method, num)
    rows = collected.examples
    for sigma in rows.sigmas.unique():
        part = rows.index((rows.sigmas == sigma).nonzero().flatten())
        errors = part.target - policy(part.latents, part.sigmas, part.cond)
        assert abs(errors.mean()) < 4 * errors.std() / num**0.5
