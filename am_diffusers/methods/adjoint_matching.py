"""Adjoint Matching (Domingo-Enrich et al., arXiv 2409.08861, section 5).

Samples p*(clean) ~ p_base(clean) * exp(reward_scale * reward(clean)) after training. An iteration rolls
the policy out with a memoryless table, sweeps the adjoint back along the trajectories under the base and
regresses the policy's velocity on the targets of matching.py. Passes through the network: K-1 policy
calls, base vjps from the last step back to the one after the earliest that is selected, of the last step
one for each of `tail_samples`, one base call at the earliest (a vjp for pairings other than `right`), and
the regression's own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.adjoint import AdjointSweep, full_adjoint, lean_adjoint
from am_diffusers.methods.parts import laws
from am_diffusers.methods.parts.continuations import Ends, ends_of
from am_diffusers.methods.parts.matching_method import MatchingMethod
from am_diffusers.methods.parts.reports import sweep_statistics
from am_diffusers.methods.parts.row_weights import Crossfit, half_norms
from am_diffusers.methods.parts.rows import Chunk, Rows
from am_diffusers.methods.parts.settings import GRADIENT, SharedSettings
from am_diffusers.methods.parts.step_selection import Selected, StepSelection
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.methods.parts.tails import with_ode_tail
from am_diffusers.rollout import Trajectory, rollout
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import TerminalCost
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning


class Steps(NamedTuple):
    """The table of an iteration and the steps that it trains."""

    table: Transitions
    selected: Selected


class AdjointMatching(MatchingMethod[Steps]):
    """Adjoint Matching with any table whose steps all add noise except the last.

    Raises:
        ValueError: if the full adjoint is combined with another rollout policy.
    """

    title, paper = "Adjoint Matching", "2409.08861"
    reads = (
        "num_inference_steps",
        "transitions",
        "pairing",
        "adjoint",
        "loss_steps",
        "step_selection",
        "late_step_odds",
        "tail_samples",
        "ode_tail",
        "mask_quantile",
        "row_weights",
        "sigma_jitter",
        "guidance_mode",
        "offload_trajectories",
        *GRADIENT,
    )
    needs_reward_gradient = True
    aims_at_tilt = True
    finds_sizes = True
    terminal: TerminalCost

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        if shared.adjoint == "full" and around.rollout is not None:
            raise ValueError("adjoint='full' differentiates the rollout: use it without a rollout field")
        self.selection = StepSelection(shared.loss_steps, shared.step_selection, odds=shared.late_step_odds)
        self.crossfit = Crossfit() if shared.row_weights == "crossfit" else None
        full = partial(full_adjoint, self.base, self.policy)
        self._adjoint = full if shared.adjoint == "full" else partial(lean_adjoint, self.base)

    @classmethod
    def law(cls, shared: SharedSettings, own: Any) -> str:
        """Return the tilt, or why it isn't; see `Method.law`."""
        return laws.of_the_tilt(shared)

    @classmethod
    def cautions(cls, shared: SharedSettings, own: Any) -> list[str]:
        """Say if an ODE tail takes the tilt away; see `Method.cautions`."""
        return laws.cautions_of_the_tilt(shared)

    def prepare(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Steps:
        """Return the table and the steps to train."""
        flags = self.shared
        table = self.around.table(
            flags.transitions, flags.num_inference_steps, jitter=flags.sigma_jitter, generator=shared
        )
        return Steps(table, self.selection.select(table, shared))

    def chunk(
        self, common: Steps, ids: list[int], cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Chunk:
        """Return trajectories with adjoints and targets, see `MatchingMethod.chunk`."""
        steps, branched = common.selected.steps, common.table.num_steps - 2
        trajectory = self._rollout(common.table, cond, generators)
        ends = self._ends(trajectory, generators)
        with phase("adjoint", len(cond)):
            sweep = self._sweep(trajectory, ends.adjoints.mean(0), steps[0])
        stats = ends.stats | sweep_statistics(trajectory, sweep)
        if self.crossfit is None:
            return self._rows(common, trajectory, sweep)._replace(stats=stats)
        stats["half_norm"] = half_norms(ends.adjoints)
        adjoint, emphasis = self.crossfit(ends.adjoints)
        crossed = sweep.adjoints | {branched + 1: adjoint}  # no other row has a target of this one
        chunk = self._rows(common, trajectory, sweep._replace(adjoints=crossed))._replace(stats=stats)
        return chunk.emphasised(steps.index(branched), emphasis) if branched in steps else chunk

    def _rows(self, common: Steps, trajectory: Trajectory, sweep: AdjointSweep) -> Chunk:
        """Return rows of the selected steps and their residuals; statistics are still to come."""
        table, (steps, factors) = common
        targets = [self._target(table, k, sweep) for k in steps]
        weights = [matching.matching_weight(table, k) for k in steps]
        residuals = [
            matching.residual(self._policy_velocity(trajectory, k), target, weight)
            for k, target, weight in zip(steps, targets, weights, strict=True)
        ]
        rows = Rows.at_steps(
            torch.stack([trajectory.latents[k] for k in steps], 1),
            torch.stack(targets, 1),
            table.sigmas[steps].tolist(),
            [weight * factor for weight, factor in zip(weights, factors, strict=True)],
        )
        return Chunk(rows, {}, torch.stack(residuals, 1))

    def report(self, columns: dict[str, Tensor]) -> tuple[dict[str, float], Sequence[str]]:
        """Return numbers to log and warnings, see `MatchingMethod.report`."""
        if self.crossfit is not None:
            self.crossfit.update(columns["half_norm"])
        return super().report(columns)

    def masked(self, common: Steps, collected: Chunk) -> Chunk:
        """Return the rows masked; the selection of steps follows the residuals that are kept."""
        return self.mask_steps(common.selected.steps, collected, self.selection)

    def state_dict(self) -> dict[str, Any]:
        """Return the common state, the sizes of the steps and the mean of the weights."""
        crossfit = {} if self.crossfit is None else {"crossfit": self.crossfit.state_dict()}
        return super().state_dict() | {"selection": self.selection.state_dict()} | crossfit

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.selection.load_state_dict(state.get("selection", {}))
        if self.crossfit is not None:
            self.crossfit.load_state_dict(state.get("crossfit", {}))

    def _rollout(
        self, table: Transitions, cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Trajectory:
        """Return a rollout; only its states know of an ODE tail, the rest is of the table."""
        field, noise = self.around.rollout or self.policy, self.latents.draw(generators)
        chain = with_ode_tail(table, self.shared.ode_tail)
        with phase("rollout", len(cond)):
            path = rollout(field, chain, cond, noise, lambda _: self.latents.draw(generators))
        return replace(path, transitions=table)

    def _ends(self, trajectory: Trajectory, generators: Sequence[torch.Generator]) -> Ends:
        """Return the continuations of the last noisy step."""
        cost, number = self.around.state_cost, self.shared.tail_samples
        return ends_of(
            self.base, trajectory, number, self.terminal, lambda: self.latents.draw(generators), cost
        )

    def _sweep(self, trajectory: Trajectory, adjoint: Tensor, first: int) -> AdjointSweep:
        """Return the sweep from adjoint_{K-1} back to the earliest step that is trained."""
        left = self.shared.pairing != "right" and first > 0  # at step 0 all pairings use adjoint_1
        end, cost = trajectory.transitions.num_steps - 1, self.around.state_cost
        return self._adjoint(trajectory, adjoint, end, first=first, with_left=left, state_cost=cost)

    def _target(self, table: Transitions, k: int, sweep: AdjointSweep) -> Tensor:
        return matching.matching_target(
            table,
            k,
            velocity_base=sweep.velocity_base[k],
            adjoint_right=sweep.adjoints[k + 1],
            adjoint_left=sweep.adjoints.get(k),
            pairing=self.shared.pairing,
        )

    def _policy_velocity(self, trajectory: Trajectory, k: int) -> Tensor:
        """Return the trained policy's velocity at x_k: known from the rollout if that followed it."""
        if self.around.rollout is None:
            return trajectory.velocities[k]
        return self.policy(*trajectory.at(k))
