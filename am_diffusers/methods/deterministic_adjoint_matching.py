"""Deterministic, truncated Adjoint Matching (arXiv 2605.06583). It does NOT sample the tilted law.

The policy's ODE is rolled out and the lean adjoint swept back along its last m steps only, under the base
(h_k = sigma_k - sigma_{k+1}):

    adjoint_K = -reward_scale * grad reward(x_K)
    adjoint_k = adjoint_{k+1} - h_k * J_base(x_k)^T adjoint_{k+1}
    target_k  = velocity_base(x_k) + |adjoint_{k+1}|^{(2-q)/(q-1)} adjoint_{k+1}
    loss      = mean over kept rows of h_k * |velocity_policy(x_k) - target_k|^2

It minimises sum h_k |u_k|^q / q - reward_scale * reward(x_K) over controls u for each noise by itself, |.|
the norm of a whole latent: a proximal map of the base's end points (docs/theory.md, sections 8 and 9).
Weights, masks and the pairing with adjoint_{k+1} are choices made here. Passes a sample: K policy calls, m-1
base vjps, one base call, and the regression's m.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.adjoint import AdjointSweep, lean_adjoint
from am_diffusers.methods.parts import laws
from am_diffusers.methods.parts.matching_method import MatchingMethod
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.reports import ADJOINT_NORM
from am_diffusers.methods.parts.rows import Chunk, Rows
from am_diffusers.methods.parts.settings import GRADIENT, SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.rollout import Trajectory, rollout
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import Terminal, TerminalCost
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class DeterministicSettings:
    """`method: deterministic_adjoint_matching`, which does NOT sample the tilted law.

    Attributes:
        truncate_steps: number of last denoising steps that are trained, at most num_inference_steps; null =
            all. This method does NOT sample base * exp(reward_scale * reward): it moves each image of the
            base uphill against the square of the way.
        cost_power: exponent q > 1 of the cost |u|^q / q of a change u of the velocity, |u| that of a whole
            latent.
    """

    truncate_steps: int | None = None
    cost_power: float = 2.0

    def __post_init__(self) -> None:
        steps = self.truncate_steps
        require(
            self,
            [
                (steps is None or steps >= 1, "truncate_steps", "at least 1, or null for all steps"),
                (self.cost_power > 1, "cost_power", "above 1, for a convex cost"),
            ],
        )


class Steps(NamedTuple):
    """The table of an iteration and the steps that it trains."""

    table: Transitions
    steps: list[int]


class DeterministicAdjointMatching(MatchingMethod[Steps]):
    """Deterministic Adjoint Matching with a table without noise.

    Raises:
        ValueError: if there are fewer steps than are to be trained.
    """

    title, paper = "Deterministic Adjoint Matching", "2605.06583"
    Settings = DeterministicSettings
    reads = ("num_inference_steps", "mask_quantile", "sigma_jitter", "offload_trajectories", *GRADIENT)
    needs_reward_gradient = True
    finds_sizes = True
    decisive = ("cost_power",)
    own: DeterministicSettings
    terminal: TerminalCost

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        total = shared.num_inference_steps
        if (self.own.truncate_steps or 1) > total:
            raise ValueError(
                f"--truncate_steps must be from 1 to num_inference_steps, {total}, or null for all steps, "
                f"got {self.own.truncate_steps}"
            )

    @classmethod
    def law(cls, shared: SharedSettings, own: DeterministicSettings) -> str:
        """Return the proximal law, see `Method.law`."""
        return laws.elsewhere(
            shared,
            "which moves each image of the base uphill, the reward against the cost of the way: not the base "
            "reweighted by the reward",
        )

    @classmethod
    def cautions(cls, shared: SharedSettings, own: DeterministicSettings) -> list[str]:
        """Return what the method isn't."""
        return [
            "deterministic_adjoint_matching does not sample base * exp(reward_scale * reward): it moves each "
            "image of the base uphill against the square of the way (a proximal step)"
        ]

    def prepare(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Steps:
        """Return the ODE's table and the last steps."""
        total = self.shared.num_inference_steps
        table = self.around.table("ode_euler", total, jitter=self.shared.sigma_jitter, generator=shared)
        return Steps(table, list(range(total - (self.own.truncate_steps or total), total)))

    def chunk(
        self, common: Steps, ids: list[int], cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Chunk:
        """Return trajectories with adjoints and targets, see `MatchingMethod.chunk`."""
        table, steps = common
        field, noise, last = self.around.rollout or self.policy, self.latents.draw(generators), steps[-1]
        with phase("rollout", len(cond)):
            trajectory = rollout(field, table, cond, noise, lambda _: noise)
            velocity = field(*trajectory.at(last))
        final = table.mean(last, trajectory.latents[last], velocity)
        terminal = self.terminal(final, cond.prompts, lambda: self.latents.draw(generators))
        with phase("adjoint", len(cond)):
            sweep = lean_adjoint(self.base, trajectory, terminal.adjoint, last + 1, first=steps[0])
        known = {k: trajectory.velocities[k] for k in steps[:-1]} | {last: velocity}
        if self.around.rollout is not None:
            known = {k: self.policy(*trajectory.at(k)) for k in steps}
        q, lengths = self.own.cost_power, [step_length(table, k) for k in steps]
        targets = [sweep.velocity_base[k] - optimal_control(sweep.adjoints[k + 1], q) for k in steps]
        residuals = [
            matching.residual(known[k], target, length)
            for k, target, length in zip(steps, targets, lengths, strict=True)
        ]
        states = torch.stack([trajectory.latents[k] for k in steps], 1)
        rows = Rows.at_steps(states, torch.stack(targets, 1), table.sigmas[steps].tolist(), lengths)
        stats = self._statistics(terminal, trajectory, sweep, known)
        return Chunk(rows, stats, torch.stack(residuals, 1))

    def masked(self, common: Steps, collected: Chunk) -> Chunk:
        """Return the rows masked."""
        return self.mask_steps(common.steps, collected)

    def _statistics(
        self, terminal: Terminal, trajectory: Trajectory, sweep: AdjointSweep, known: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return named statistics of B samples, (B,) each; `control_cost` is that of the trained steps."""
        controls = {k: sweep.velocity_base[k] - velocity for k, velocity in known.items()}
        return {
            "reward": terminal.rewards,
            "reward_gradient_norm": terminal.gradient_norms,
            "reward_slope": terminal.slopes,
            "control_cost": control_cost(trajectory.transitions, controls, self.own.cost_power),
            **{f"{ADJOINT_NORM}{k:02d}": a.flatten(1).norm(dim=1) for k, a in sorted(sweep.adjoints.items())},
        }


def optimal_control(adjoint: Tensor, cost_power: float) -> Tensor:
    """Return the u that minimises |u|^q / q + adjoint . u, (B, ...): -|adjoint|^{(2-q)/(q-1)} adjoint.

    Args:
        adjoint: (B, ...); its norms are those of whole samples.
        cost_power: q > 1.
    """
    norm = adjoint.flatten(1).norm(dim=1).clamp(min=torch.finfo(adjoint.dtype).tiny)
    size = norm ** ((2 - cost_power) / (cost_power - 1))
    return -size.view(-1, *[1] * (adjoint.ndim - 1)) * adjoint


def step_length(table: Transitions, k: int) -> float:
    """Return the length of step `k` in sigma: the cost of a control there is this times |u|^q / q."""
    return -table.v_coef[k].item()


def control_cost(table: Transitions, controls: Mapping[int, Tensor], cost_power: float) -> Tensor:
    """Return what the controls of some steps cost together, (B,).

    Args:
        table: one without noise.
        controls: u_k by step k, (B, ...) each, at least one.
        cost_power: q > 1.
    """
    sizes = {k: control.flatten(1).norm(dim=1) for k, control in controls.items()}
    costs = [step_length(table, k) * size**cost_power / cost_power for k, size in sizes.items()]
    return torch.stack(costs).sum(0)
