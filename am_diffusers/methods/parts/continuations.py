"""Several continuations of a rollout's last noisy step, and the mean of their adjoints.

    x^m_{K-1} = mean_{K-2}(x_{K-2}) + std_{K-2} xi_m,   m = 1 .. M;   x^m_K by the last step of the base
    adjoint_{K-1} = mean over m of the adjoint that x^m_K pulls back to x^m_{K-1}

Given x_{K-2}, this mean has the expectation of a single adjoint. Sweeps are affine in the adjoint they
start from, so every conditional mean that a row regresses on is what it is with M = 1: the fixed point is the
same, also that of the discrete chain, and all rows have less noise. It costs M - 1 vjps and gradients of the
reward.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.adjoint import StateCost, last_step
from am_diffusers.methods.parts.reports import terminal_statistics
from am_diffusers.methods.parts.tails import steps_of
from am_diffusers.rollout import Trajectory
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import TerminalCost
from am_diffusers.velocity import VelocityField


class Ends(NamedTuple):
    """The M ends of B rollouts.

    Attributes:
        adjoints: adjoint_{K-1} of each continuation, (M, B, ...).
        stats: named statistics of the samples, means over the continuations, (B,) each.
    """

    adjoints: Tensor
    stats: dict[str, Tensor]


def continuations(trajectory: Trajectory, number: int, draw: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Yield x_{K-1} of a rollout, (B, ...), and others from its x_{K-2}, each drawn when it is asked for."""
    yield trajectory.latents[-1]
    table, k = trajectory.transitions, trajectory.transitions.num_steps - 2
    for _ in range(number - 1):
        yield table.step(k, trajectory.latents[k], trajectory.velocities[k], draw())


def ends_of(
    base: VelocityField,
    trajectory: Trajectory,
    number: int,
    terminal: TerminalCost,
    draw: Callable[[], Tensor],
    state_cost: StateCost | None = None,
) -> Ends:
    """Take the last step of each continuation and pull its reward's gradient back, one after the other.

    Args:
        base: field before fine-tuning.
        trajectory: rollout of the policy, the first continuation.
        number: M.
        terminal: makes adjoint_K.
        draw: draws a standard normal latent for each sample.
        state_cost: running cost of the states, see adjoint.py; None = 0.
    """
    cond, num_steps, found, adjoints = trajectory.cond, trajectory.transitions.num_steps, [], []
    table = steps_of(trajectory.transitions, num_steps - 1, num_steps)
    for x in continuations(trajectory, number, draw):
        with phase("adjoint", len(cond)):
            last = last_step(base, Trajectory(x[None], x[None][1:], table, cond), state_cost)
        start = terminal(last.final, cond.prompts, draw)
        with phase("adjoint", len(cond)):
            adjoints.append(last.pull(start.adjoint))
        found.append(terminal_statistics(start, num_steps))
    stats = {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}
    return Ends(torch.stack(adjoints), stats)
