"""Velocities that Adjoint Matching converges to, computed on a 1-D grid.

The conditional mean of the lean adjoint given the state, A_k(x) = E[adjoint_k | x_k = x], obeys

    A_k(x) = J_k(x) E[A_{k+1}(x_{k+1})],   J_k = x_coef + v_coef * velocity_base',

with x_{k+1} drawn by the policy's step, so that the regression's fixed point velocity_k(x) =
target(E[A_{k+1}]) is an equation in one number for each k and x. It is solved by damped iteration from
the base, which follows the regression's own descent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from am_diffusers.matching import matching_target
from am_diffusers.transitions import Transitions
from oracles import Mixture, unconditional
from pull_backs import vjp

Terminal = Callable[[Tensor], Tensor]
GRID = torch.linspace(-5, 5, 1001, dtype=torch.float64)
COND = unconditional(len(GRID))
SIGMAS = [i / 10 for i in range(1, 10)]
DAMPING, ITERATIONS = 0.2, 120


def lookup(values: Tensor, x: Tensor) -> Tensor:
    """Linear interpolation of `values` on GRID at `x`, constant outside."""
    place = ((x - GRID[0]) / (GRID[1] - GRID[0])).clamp(0, len(GRID) - 1.000001)
    left = place.long()
    return torch.lerp(values[left], values[left + 1], place - left)


def base_and_jacobian(law: Mixture, sigma: float) -> tuple[Tensor, Tensor]:
    """Base velocity on GRID and its derivative."""
    x = GRID[:, None]
    both = vjp(law.field(), x, x.new_full((len(x),), sigma), COND, torch.ones_like(x))
    return both[0][:, 0], both[1][:, 0]


def fixed_point(law: Mixture, terminal: Terminal, table: Transitions, pairing: str) -> dict[float, Tensor]:
    """Learned velocity on GRID by sigma of the table, the base's at the last step.

    `terminal` maps final latents (B,) to the start of their adjoints (B,).
    """
    last = table.num_steps - 1
    velocity, derivative = base_and_jacobian(law, table.sigmas[last].item())
    final = table.mean(last, GRID, velocity)
    adjoint = (table.x_coef[last] + table.v_coef[last] * derivative) * terminal(final)
    learned = {table.sigmas[last].item(): velocity}
    for k in range(last - 1, -1, -1):
        base, derivative = base_and_jacobian(law, table.sigmas[k].item())
        jacobian = table.x_coef[k] + table.v_coef[k] * derivative
        smoothed = (-0.5 * ((GRID[:, None] - GRID) / table.std[k]) ** 2).softmax(1) @ adjoint
        velocity = base
        for _ in range(ITERATIONS):
            right = lookup(smoothed, table.mean(k, GRID, velocity))
            target = matching_target(
                table,
                k,
                velocity_base=base,
                adjoint_right=right,
                adjoint_left=jacobian * right,
                pairing=pairing,
            )
            velocity = torch.lerp(velocity, target, DAMPING)
        adjoint = jacobian * right
        learned[table.sigmas[k].item()] = velocity
    return learned


@dataclass(frozen=True)
class Truth:
    """Exact tilted velocity and marginal (normalised) on GRID at a noise level, by quadrature."""

    velocity: Tensor
    marginal: Tensor

    @classmethod
    def at(cls, law: Mixture, log_ratio: Callable[[Tensor], Tensor], sigma: float) -> "Truth":
        clean = torch.linspace(-5, 5, 2001, dtype=torch.float64)
        log_tilted = law.log_density(clean[:, None], 0.0) + log_ratio(clean)
        joint = log_tilted - 0.5 * ((GRID[:, None] - (1 - sigma) * clean) / sigma) ** 2
        posterior_mean = joint.softmax(1) @ clean
        return cls((GRID - posterior_mean) / sigma, joint.logsumexp(1).softmax(0))

    def square_error(self, velocity: Tensor) -> float:
        return (self.marginal @ (velocity - self.velocity) ** 2).item()


def error(learned: dict[float, Tensor], truth: dict[float, Truth]) -> float:
    """RMS error at sigma = .1 .. .9, all of them nodes of every grid used here."""
    squares = [
        truth[s].square_error(velocity)
        for node, velocity in learned.items()
        for s in truth
        if abs(s - node) < 1e-9
    ]
    assert len(squares) == len(truth)
    return float(np.sqrt(np.mean(squares)))
