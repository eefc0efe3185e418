"""Efficient Adjoint Matching (arXiv 2605.11480): a reconstruction, with a linear base and no trajectories.

Aims at the tilt p_base(clean) * exp(reward_scale * reward(clean)) from another base, a linear SDE, whose
adjoint is known in closed form (linear_base.py), so that any sampler of the policy provides end points. For
each sample:

1. clean = the end of the policy's ODE, in second-order steps; its reward and the reward's gradient.
2. `renoised`: the base's score near `clean`, from its velocity at `clean` noised to `eam_sigma`.
   `stopped`: the ODE halts at that noise level; the base's velocity there gives its score, and the gradient
   of the reward of the base's clean estimate, through the base. Nothing below `eam_sigma` is trained.
3. `eam_rows` noise levels, one in each of as many equal parts: the end point noised, the target of
linear_base.py.

A row weighs min(2 (1 - s) / s, eam_max_weight) / steps, what a step of a memoryless rollout weighs. Errors
of the few-step ODE are learned again and again, and the score is approximate: docs/theory.md, section 9. The
paper's constants aren't known to agree. Passes a sample: the ODE's steps, one base call or vjp, the
regression's rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from am_diffusers.adjoint import last_step
from am_diffusers.methods.parts import laws, linear_base
from am_diffusers.methods.parts.matching_method import MatchingMethod
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.reports import end_point_statistics, means
from am_diffusers.methods.parts.rows import Chunk, Rows
from am_diffusers.methods.parts.settings import GRADIENT, SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.parametrization import interpolate, score_from_velocity
from am_diffusers.rollout import Trajectory, sample_ode
from am_diffusers.system.failures import phase, require_finite
from am_diffusers.terminal_cost import Terminal, TerminalCost
from am_diffusers.transitions import ode_euler
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class EfficientSettings:
    """`method: efficient_adjoint_matching`, a reconstruction of the paper.

    Attributes:
        eam_ode_steps: steps of second order of the policy's ODE to an end point; too few shrink the spread
            of what is learned.
        eam_rows: noise levels a sample is trained at, one in each of as many equal parts of (0, 1].
        eam_c: variance C of the Gaussian data behind the linear base, in squared latent units; .01 to .1 of
            the latents' variance is best. The reward acts through it: smaller is calmer and slower.
        eam_score: how the base's score is obtained: stopped (the ODE stops before its end, one step of the
            base leads on to the reward), or renoised (of end points, taken a little noisier).
        eam_sigma: noise level of that stop or score, in (0, 1); for renoised .05 to .1 is best.
        eam_max_weight: largest weight 2 (1 - sigma) / sigma of a row; Adjoint Matching's has no bound.
    """

    eam_ode_steps: int = 20
    eam_rows: int = 4
    eam_c: float = 0.05
    eam_score: Literal["stopped", "renoised"] = "stopped"
    eam_sigma: float = 0.3
    eam_max_weight: float = 20.0

    def __post_init__(self) -> None:
        require(
            self,
            [
                (1 <= self.eam_ode_steps <= 1000, "eam_ode_steps", "from 1 to 1000"),
                (1 <= self.eam_rows <= 1000, "eam_rows", "from 1 to 1000"),
                (self.eam_c > 0, "eam_c", "positive"),
                (0 < self.eam_sigma < 1, "eam_sigma", "in (0, 1)"),
                (self.eam_max_weight > 0, "eam_max_weight", "positive"),
            ],
        )


class Start(NamedTuple):
    """States that rows are noised from.

    Attributes:
        x: clean images, or states at the noise level where the ODE stops, (B, ...).
        score: the base's score there, (B, ...).
        adjoint: gradient of the terminal cost there, (B, ...).
        terminal: rewards and what was made of their gradients.
    """

    x: Tensor
    score: Tensor
    adjoint: Tensor
    terminal: Terminal


class EfficientAdjointMatching(MatchingMethod[None]):
    """Efficient Adjoint Matching from an ODE sampler of the policy."""

    title, paper = "Efficient Adjoint Matching", "2605.11480"
    Settings = EfficientSettings
    reads = ("offload_trajectories", *GRADIENT)
    needs_reward_gradient = True
    finds_sizes = True
    decisive = ("eam_score", "eam_sigma")
    own: EfficientSettings
    terminal: TerminalCost

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        self.lowest = self.own.eam_sigma if self.own.eam_score == "stopped" else 0.0
        self.sigmas = self.lowest + (1 - self.lowest) * around.sigmas(self.own.eam_ode_steps, False)

    @classmethod
    def law(cls, shared: SharedSettings, own: EfficientSettings) -> str:
        """Return the tilt and why it is missed, see `Method.law`."""
        return laws.elsewhere(
            shared,
            "a reconstruction of the paper: its few-step ODE and its estimate of the base's score make it "
            "miss the base reweighted by the reward",
        )

    def prepare(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> None:
        """Return nothing: chunks share no more than the settings."""

    def chunk(
        self, common: None, ids: list[int], cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Chunk:
        """Return end points, noised, with targets, see `MatchingMethod.chunk`."""
        start = self._start(cond, generators)
        stats = end_point_statistics(start.terminal, start.adjoint, start.score)
        return Chunk(self._rows(start, generators), stats)

    def report(self, columns: dict[str, Tensor]) -> tuple[dict[str, float], Sequence[str]]:
        """Return numbers to log; there is one adjoint, that of the rows: its growth can be watched."""
        self.terminal.update(columns["reward_gradient_norm"])
        norm = {len(self.sigmas) - 1: columns["adjoint_norm"].median().item()}
        return means(columns), self.monitor.update(norm)

    def _start(self, cond: Conditioning, generators: Sequence[torch.Generator]) -> Start:
        """Return states to noise, where the policy's ODE leads."""
        noise, field = self.latents.draw(generators), self.around.rollout or self.policy
        with phase("rollout", len(cond)):
            x = sample_ode(field, self.sigmas, cond, noise)
        stopped = self.own.eam_score == "stopped"
        return (self._stopped if stopped else self._renoised)(cond, x, generators)

    def _renoised(self, cond: Conditioning, clean: Tensor, generators: Sequence[torch.Generator]) -> Start:
        """Return clean images with the base's score near them."""
        sigma = self.own.eam_sigma
        terminal = self.terminal(clean, cond.prompts, lambda: self.latents.draw(generators))
        x = interpolate(clean, self.latents.draw(generators), sigma)
        with phase("rollout", len(cond)):
            velocity = self.base(x, x.new_full((len(x),), sigma), cond)
        score = linear_base.renoised_score(x, sigma, velocity)
        return Start(clean, score, terminal.adjoint, terminal)

    def _stopped(self, cond: Conditioning, x: Tensor, generators: Sequence[torch.Generator]) -> Start:
        """Return states at the noise level where the ODE stops; a step of the base leads on to the reward."""
        to_the_end = ode_euler(torch.tensor([self.lowest, 0.0], dtype=torch.float64))
        with phase("adjoint", len(cond)):
            last = last_step(self.base, Trajectory(x[None], x[None][1:], to_the_end, cond))
        terminal = self.terminal(last.final, cond.prompts, lambda: self.latents.draw(generators))
        with phase("adjoint", len(cond)):
            adjoint = last.pull(terminal.adjoint)
        require_finite(f"adjoint at sigma {self.lowest:.4f}", adjoint, cond.prompts)
        score = score_from_velocity(x, self.lowest, last.velocity)
        return Start(x, score, adjoint, terminal)

    def _rows(self, start: Start, generators: Sequence[torch.Generator]) -> Rows:
        """Return rows of the samples, `eam_rows` each."""
        number, lowest = self.own.eam_rows, self.lowest
        sigma = torch.cat([linear_base.stratified_sigmas(number, lowest, g) for g in generators])
        noise = torch.stack([self.latents.draw(generators) for _ in range(number)], 1).flatten(0, 1)
        x_e, score, adjoint = (
            part.repeat_interleave(number, 0) for part in (start.x, start.score, start.adjoint)
        )
        x = linear_base.later_state(x_e, lowest, sigma, noise)
        target = linear_base.linear_target(
            x, sigma, x_e, lowest, score=score, adjoint=adjoint, variance=self.own.eam_c
        )
        weight = linear_base.capped_weight(sigma, self.own.eam_max_weight) / (len(self.sigmas) - 1)
        columns = x, target, sigma.to(x), weight.to(x), torch.ones_like(sigma).to(x)
        return Rows(*(column.unflatten(0, (len(generators), number)) for column in columns))
