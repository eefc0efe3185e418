"""Adjoints of a rollout: how the terminal cost changes with the state at each step.

With the cost -reward_scale * reward(x_K), the *lean* adjoint (Adjoint Matching, arXiv 2409.08861,
section 5) is the vector-Jacobian product of the step's mean under the base,

    adjoint_K = -reward_scale * grad reward(x_K)
    adjoint_k = x_coef[k] * adjoint_{k+1} + v_coef[k] * J_base(x_k, sigma[k])^T adjoint_{k+1}

along a trajectory of the policy. The *full* adjoint of the discrete chain (ibid., basic adjoint
matching, for study) differentiates the policy and the running cost as well:

    adjoint_k = grad_x [ path_kl_k(x) + adjoint_{k+1} . mean_policy_k(x) ]

The chain's last step is the base's deterministic one, `last_step`: the pass at k = K-1 that differentiates
it also provides its velocity, hence x_K. A sweep goes back from an adjoint that is known to the earliest step
that is trained, and no further.

A running *state cost* f, the general form of stochastic optimal control (ibid., section 2), adds
(sigma[k] - sigma[k+1]) * f(x_k, sigma[k]) to the cost of a trajectory for every k and its gradient to
adjoint_k. Like the path KL it is a cost: small is good. With a memoryless table the final law is then the
base's times exp(reward_scale * reward) * E_base[exp(-sum of those costs) | x_K]: f changes what is sampled.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.rollout import Trajectory
from am_diffusers.system.failures import require_finite
from am_diffusers.velocity import Conditioning, Pull, VelocityField

StateCost = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Differentiable running cost f of states (B, ...), sigmas (B,) and conditioning: (B,), per unit of sigma."""
Running = Callable[[int], Tensor | float]
"""The part of adjoint_k that step k's own state cost makes, by k."""


class AdjointSweep(NamedTuple):
    """Result of a sweep from step `end` back to step `first`, without gradients.

    Attributes:
        adjoints: adjoint_k by step k = first + 1 .. end, and `first` if it was asked for, (B, ...) each.
        velocity_base: base velocity at x_k by step k = first .. end - 1, (B, ...) each.
    """

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
        pull: adjoint_K -> adjoint_{K-1}; to be called once.
    """

    final: Tensor
    velocity: Tensor
    pull: Pull


def last_step(base: VelocityField, trajectory: Trajectory, state_cost: StateCost | None = None) -> LastStep:
    """Take the last step of a rollout: one forward pass of the base, whose backward pass is `pull`'s."""
    table = trajectory.transitions
    k = table.num_steps - 1
    x, sigma, cond = trajectory.at(k)
    x_coef, v_coef = table.x_coef[k].item(), table.v_coef[k].item()
    velocity, pull_velocity = base.vjp(x, sigma, cond)
    running = _running(trajectory, state_cost)

    def pull(adjoint: Tensor) -> Tensor:
        return x_coef * adjoint + pull_velocity(v_coef * adjoint) + running(k)

    return LastStep(table.mean(k, x, velocity), velocity, pull)


def lean_adjoint(
    base: VelocityField,
    trajectory: Trajectory,
    adjoint: Tensor,
    end: int,
    *,
    first: int = 0,
    with_left: bool = False,
    state_cost: StateCost | None = None,
) -> AdjointSweep:
    """Sweep the lean adjoint back from `end`: vjps of the base down to first + 1, and one call at `first`.

    Args:
        base: field before fine-tuning.
        trajectory: rollout of the policy.
        adjoint: adjoint_end, (B, ...).
        end: the step it belongs to, at most K.
        first: the first step whose base velocity is wanted, below `end`.
        with_left: also take adjoint_first, in the same pass: pairings other than `right` need it.
        state_cost: running cost of the states, see the module docstring; None = 0.

    Raises:
        NonFiniteError: if an adjoint is not finite; names step, sigma and prompts.
    """
    step = partial(_lean_step, base, trajectory, _running(trajectory, state_cost))
    return _sweep(base, trajectory, step, adjoint, end, first=first, with_left=with_left)


def full_adjoint(
    base: VelocityField,
    policy: VelocityField,
    trajectory: Trajectory,
    adjoint: Tensor,
    end: int,
    *,
    first: int = 0,
    with_left: bool = False,
    state_cost: StateCost | None = None,
) -> AdjointSweep:
    """Sweep the basic adjoint of the discrete chain, with as many vjps of the policy as of the base.

    Args:
        base: field before fine-tuning.
        policy: field the trajectory was rolled out with.
        trajectory: rollout of `policy`.
        adjoint: adjoint_end, (B, ...).
        end: the step it belongs to, at most K.
        first: the first step whose base velocity is wanted, below `end`.
        with_left: also take adjoint_first, in the same pass: pairings other than `right` need it.
        state_cost: running cost of the states, see the module docstring; None = 0.

    Raises:
        NonFiniteError: if an adjoint is not finite; names step, sigma and prompts.
    """
    step = partial(_full_step, base, policy, trajectory, _running(trajectory, state_cost))
    return _sweep(base, trajectory, step, adjoint, end, first=first, with_left=with_left)


def _sweep(
    base: VelocityField,
    trajectory: Trajectory,
    step: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    adjoint: Tensor,
    end: int,
    *,
    first: int,
    with_left: bool,
) -> AdjointSweep:
    """Return the adjoints and base velocities that `step` makes of one adjoint after the other."""
    adjoints, velocities = {end: adjoint}, {}
    for k in range(end - 1, first - with_left, -1):
        velocities[k], adjoints[k] = step(k, adjoints[k + 1])
    _require_finite_adjoints(adjoints, trajectory)
    if not with_left:
        with torch.no_grad():
            velocities[first] = base(*trajectory.at(first))
    return AdjointSweep(adjoints, velocities)


def _require_finite_adjoints(adjoints: dict[int, Tensor], trajectory: Trajectory) -> None:
    for k, adjoint in adjoints.items():
        sigma = trajectory.transitions.sigmas[k].item()
        require_finite(f"adjoint of step {k} (sigma {sigma:.4f})", adjoint, trajectory.cond.prompts)


def _running(trajectory: Trajectory, state_cost: StateCost | None) -> Running:
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


def _lean_step(
    base: VelocityField, trajectory: Trajectory, running: Running, k: int, adjoint: Tensor
) -> tuple[Tensor, Tensor]:
    """Base velocity at x_k and adjoint_k from `adjoint` = adjoint_{k+1}."""
    x_coef, v_coef = trajectory.transitions.x_coef[k].item(), trajectory.transitions.v_coef[k].item()
    velocity, pull = base.vjp(*trajectory.at(k))
    return velocity, x_coef * adjoint + pull(v_coef * adjoint) + running(k)


def _full_step(
    base: VelocityField,
    policy: VelocityField,
    trajectory: Trajectory,
    running: Running,
    k: int,
    adjoint: Tensor,
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
    return velocity, x_coef * adjoint + through_base + through_policy + running(k)
