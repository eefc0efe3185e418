"""Adjoints of a rollout: how the terminal cost changes with the state at each step.

With the cost -reward_scale * reward(x_K), the *lean* adjoint (Adjoint Matching, arXiv 2409.08861,
section 5) is the vector-Jacobian product of the step's mean under the base,

    adjoint_K = -reward_scale * grad reward(x_K)
    adjoint_k = x_coef[k] * adjoint_{k+1} + v_coef[k] * J_base(x_k, sigma[k])^T adjoint_{k+1}

along a trajectory of the policy. The *full* adjoint of the discrete chain (ibid., basic adjoint
matching, for study) differentiates the policy and the running cost as well:

    adjoint_k = grad_x [ path_kl_k(x) + adjoint_{k+1} . mean_policy_k(x) ]

In both, the last step is the base's deterministic one; the pass at k = K-1 that differentiates it also
provides its velocity, hence x_K. `truncated_adjoint` is the lean adjoint of a rollout that took all its
steps itself, along the last of them only.

A running *state cost* f, the general form of stochastic optimal control (ibid., section 2), adds
(sigma[k] - sigma[k+1]) * f(x_k, sigma[k]) to the cost of a trajectory for every k and its gradient to
adjoint_k. Like the path KL it is a cost: small is good. With a memoryless table the final law is then the
base's times exp(reward_scale * reward) * E_base[exp(-sum of those costs) | x_K]: f changes what is sampled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.rollout import Trajectory
from am_diffusers.system.failures import require_finite
from am_diffusers.velocity import Conditioning, Pull, VelocityField

StateCost = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Differentiable running cost f of states (B, ...), sigmas (B,) and conditioning: (B,), per unit of sigma."""


@dataclass(frozen=True, eq=False)
class AdjointSweep:
    """Result of a backward sweep along a trajectory, without gradients.

    Attributes:
        final: x_K, (B, ...).
        adjoints: adjoint_k by step k = 1 .. K (or those at the end that were asked for), (B, ...) each.
        velocity_base: base velocity at x_k by step k = 0 .. K-1 (0 only if asked for), (B, ...) each.
    """

    final: Tensor
    adjoints: dict[int, Tensor]
    velocity_base: dict[int, Tensor]


def terminal_adjoint(gradient: Tensor, reward_scale: float) -> Tensor:
    """Gradient of the terminal cost, -reward_scale * grad reward: the only minus sign of the package."""
    return -reward_scale * gradient


class LastStep(NamedTuple):
    """The deterministic last step of a rollout, taken with the base.

    Attributes:
        final: x_K, (B, ...).
        velocity: base velocity at x_{K-1}, (B, ...).
        pull: adjoint_K -> adjoint_{K-1} without the step's own state cost; to be called once.
    """

    final: Tensor
    velocity: Tensor
    pull: Pull


def last_step(base: VelocityField, trajectory: Trajectory) -> LastStep:
    """Take the last step of a rollout: one forward pass of the base, whose backward pass is `pull`'s."""
    table = trajectory.transitions
    k = table.num_steps - 1
    x, sigma, cond = trajectory.at(k)
    x_coef, v_coef = table.x_coef[k].item(), table.v_coef[k].item()
    velocity, pull_velocity = base.vjp(x, sigma, cond)

    def pull(adjoint: Tensor) -> Tensor:
        return x_coef * adjoint + pull_velocity(v_coef * adjoint)

    return LastStep(table.mean(k, x, velocity), velocity, pull)


def lean_adjoint(
    base: VelocityField,
    trajectory: Trajectory,
    last: LastStep,
    adjoint: Tensor,
    *,
    with_first: bool = True,
    state_cost: StateCost | None = None,
) -> AdjointSweep:
    """Sweep the lean adjoint back along a trajectory: K-1 vjps of the base, the first that of `last_step`.

    Args:
        base: field before fine-tuning.
        trajectory: rollout of the policy.
        last: last step of the trajectory.
        adjoint: adjoint_K, (B, ...).
        with_first: also evaluate the base at k = 0 (one call), for the matching target of step 0.
        state_cost: running cost of the states, see the module docstring; None = 0.

    Raises:
        NonFiniteError: if an adjoint is not finite; names step, sigma and prompts.
    """
    sweep = _Sweep(base, trajectory, _running(trajectory, state_cost), with_first)
    return sweep.run(last, adjoint, partial(_lean_step, base, trajectory))


def truncated_adjoint(
    base: VelocityField, trajectory: Trajectory, final: Tensor, adjoint: Tensor, *, first: int = 0
) -> AdjointSweep:
    """Lean adjoint along steps `first` .. K-1 of a rollout whose end is known.

    K-1-first vjps of the base, at k = K-1 .. first+1, and one call at `first`, of which only the velocity
    is needed.

    Args:
        base: field before fine-tuning.
        trajectory: rollout of the policy.
        final: x_K, wherever its last step led, (B, ...).
        adjoint: adjoint_K, (B, ...).
        first: the first step whose base velocity is wanted, in 0 .. K-1.

    Raises:
        NonFiniteError: if an adjoint is not finite; names step, sigma and prompts.
    """
    last = trajectory.transitions.num_steps - 1
    adjoints, velocities = {last + 1: adjoint}, {}
    for k in range(last, first, -1):
        velocities[k], adjoints[k] = _lean_step(base, trajectory, k, adjoints[k + 1])
    _require_finite_adjoints(adjoints, trajectory)
    with torch.no_grad():
        velocities[first] = base(*trajectory.at(first))
    return AdjointSweep(final, adjoints, velocities)


def full_adjoint(
    base: VelocityField,
    policy: VelocityField,
    trajectory: Trajectory,
    last: LastStep,
    adjoint: Tensor,
    *,
    with_first: bool = True,
    state_cost: StateCost | None = None,
) -> AdjointSweep:
    """Sweep the basic adjoint of the discrete chain: K-1 vjps of the base, K-2 of the policy.

    Args:
        base: field before fine-tuning.
        policy: field the trajectory was rolled out with.
        trajectory: rollout of `policy`.
        last: last step of the trajectory.
        adjoint: adjoint_K, (B, ...).
        with_first: also evaluate the base at k = 0 (one call), for the matching target of step 0.
        state_cost: running cost of the states, see the module docstring; None = 0.

    Raises:
        NonFiniteError: if an adjoint is not finite; names step, sigma and prompts.
    """
    sweep = _Sweep(base, trajectory, _running(trajectory, state_cost), with_first)
    return sweep.run(last, adjoint, partial(_full_step, base, policy, trajectory))


@dataclass(frozen=True)
class _Sweep:
    """A sweep back, lean or full: all but the step."""

    base: VelocityField
    trajectory: Trajectory
    running: Callable[[int], Tensor | float]
    with_first: bool

    def run(
        self, last: LastStep, adjoint: Tensor, step: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    ) -> AdjointSweep:
        """Return the adjoints and the base velocities of all steps."""
        end = self.trajectory.transitions.num_steps
        adjoints, velocities = {end: adjoint}, {end - 1: last.velocity}
        adjoints[end - 1] = last.pull(adjoint) + self.running(end - 1)
        for k in range(end - 2, 0, -1):
            velocities[k], without_cost = step(k, adjoints[k + 1])
            adjoints[k] = without_cost + self.running(k)
        _require_finite_adjoints(adjoints, self.trajectory)
        if self.with_first:
            with torch.no_grad():
                velocities[0] = self.base(*self.trajectory.at(0))
        return AdjointSweep(last.final, adjoints, velocities)


def _require_finite_adjoints(adjoints: dict[int, Tensor], trajectory: Trajectory) -> None:
    for k, adjoint in adjoints.items():
        sigma = trajectory.transitions.sigmas[k].item()
        require_finite(f"adjoint of step {k} (sigma {sigma:.4f})", adjoint, trajectory.cond.prompts)


def _running(trajectory: Trajectory, state_cost: StateCost | None) -> Callable[[int], Tensor | float]:
    """Return the part of adjoint_k that step k's own state cost makes, by k."""
    if state_cost is None:
        return lambda k: 0.0
    sigmas = trajectory.transitions.sigmas

    def gradient(k: int) -> Tensor:
        x, sigma, cond = trajectory.at(k)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            total = state_cost(x, sigma, cond).sum()
        (gradient,) = torch.autograd.grad(total, x)
        return (sigmas[k] - sigmas[k + 1]).item() * gradient

    return gradient


def _lean_step(base: VelocityField, trajectory: Trajectory, k: int, adjoint: Tensor) -> tuple[Tensor, Tensor]:
    """Base velocity at x_k and adjoint_k from `adjoint` = adjoint_{k+1}."""
    x_coef, v_coef = trajectory.transitions.x_coef[k].item(), trajectory.transitions.v_coef[k].item()
    velocity, pull = base.vjp(*trajectory.at(k))
    return velocity, x_coef * adjoint + pull(v_coef * adjoint)


def _full_step(
    base: VelocityField, policy: VelocityField, trajectory: Trajectory, k: int, adjoint: Tensor
) -> tuple[Tensor, Tensor]:
    """Base velocity at x_k and the full adjoint_k from `adjoint` = adjoint_{k+1}.

    With d = velocity_policy - velocity_base and weight = (v_coef / std)^2, the gradient of
    weight * |d|^2 / 2 + adjoint . (x_coef x + v_coef velocity_policy) has a part through each field.
    """
    table = trajectory.transitions
    x_coef, v_coef = table.x_coef[k].item(), table.v_coef[k].item()
    weight = (v_coef / table.std[k].item()) ** 2
    velocity_policy = trajectory.velocities[k]
    velocity, pull_base = base.vjp(*trajectory.at(k))
    through_base = pull_base(weight * (velocity - velocity_policy))
    _, pull_policy = policy.vjp(*trajectory.at(k))
    through_policy = pull_policy(v_coef * adjoint + weight * (velocity_policy - velocity))
    return velocity, x_coef * adjoint + through_base + through_policy
