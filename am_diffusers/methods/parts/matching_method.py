"""Methods that regress on velocities, and what they have in common: chunks, mask, reports, loss, state.

A method says what the chunks of an iteration share (`prepare`) and what a chunk of samples contributes
(`chunk`). The rest is here: samples go through the network `Sizes.rollout` at a time, rows wait on the CPU
with `Sizes.offload`, rows of largest residual are masked or weigh less, statistics are exchanged between
ranks and logged.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.matching import MatchingBatch, QuantileMask
from am_diffusers.methods.base import Collected, Method
from am_diffusers.methods.parts.reports import AdjointMonitor, adjoint_norms, everywhere, means
from am_diffusers.methods.parts.row_weights import Ramp
from am_diffusers.methods.parts.rows import Chunk, Swept, kept_batch
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.step_selection import StepSelection
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.terminal_cost import GradientOptions, TerminalCost
from am_diffusers.velocity import Conditioning

S = TypeVar("S")


class MatchingMethod(Method[MatchingBatch], Generic[S]):
    """A method whose rows are states, noise levels and velocities to regress on; see `Method`."""

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        quantile = shared.mask_quantile if "mask_quantile" in self.reads else None
        self.mask = None if quantile is None else QuantileMask(quantile)
        ramped = "row_weights" in self.reads and shared.row_weights == "ramp"
        self.ramp = Ramp(around.iterations) if ramped else None
        self.terminal = self._terminal_cost() if self.needs_reward_gradient else None
        self.monitor = AdjointMonitor()

    @abstractmethod
    def prepare(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> S:
        """Return what the chunks of an iteration share, for instance the table and the selected steps."""

    @abstractmethod
    def chunk(
        self, common: S, ids: list[int], cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Chunk:
        """Return the rows of some samples.

        Args:
            common: what `prepare` returned.
            ids: rows of this rank's samples that are meant.
            cond: conditioning of those samples.
            generators: generators of those samples.
        """

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """Return training rows of the samples, see `Method.collect`.

        Raises:
            ValueError: if the table or the samples don't suit the method.
            NonFiniteError: if a reward, gradient or adjoint is not finite.
            PhaseMemoryError: if memory runs out.
        """
        swept = self.sweep(cond, generators, shared)
        samples = torch.arange(len(cond))[:, None].expand(swept.rows.keep.shape)
        examples, masked = kept_batch(swept.rows, samples, cond, self.gather, all_kept=self.mask is None)
        if self.sizes.offload and torch.device(self.latents.device).type == "cuda":
            examples = examples.pin_memory()
        of_mask = {"masked": masked} if "mask_quantile" in self.reads else {}
        return Collected(examples, swept.rewards, swept.metrics | of_mask, swept.warnings)

    @torch.no_grad()
    def sweep(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Swept:
        """Return the rows of this rank's samples before they are weighted; raises as `collect`."""
        common, chunks = self.prepare(cond, generators, shared), []
        for rows in torch.arange(len(cond)).split(self.sizes.rollout or len(cond)):
            ids = rows.tolist()
            chunk = self.chunk(common, ids, cond.index(ids), [generators[i] for i in ids])
            chunks.append(chunk._replace(rows=chunk.rows.to_cpu()) if self.sizes.offload else chunk)
        collected = Chunk.cat(chunks)
        metrics, warnings = self.report(everywhere(collected.stats, self.gather))
        rows = self.masked(common, collected)
        return Swept(rows.rows, collected.stats["reward"], metrics, warnings)

    def masked(self, common: S, collected: Chunk) -> Chunk:
        """Return the rows with those of largest residual masked; methods without a mask keep all."""
        return collected

    def report(self, columns: dict[str, Tensor]) -> tuple[dict[str, float], Sequence[str]]:
        """Return numbers to log and warnings from the statistics of the samples of all ranks, (N,) each."""
        if self.terminal is None:
            return means(columns), ()
        self.terminal.update(columns["reward_gradient_norm"])
        return means(columns), self.monitor.update(adjoint_norms(columns))

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the share of the matching loss that these rows contribute, see `Method.loss`."""
        return matching.matching_loss(self.policy, example.to(self.latents.device)), {}

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds of mask, weights and clipping, and references of the adjoint norms."""
        if self.terminal is None:
            return {}
        mask = {} if self.mask is None else {"mask": self.mask.state_dict()}
        mask |= {} if self.ramp is None else {"ramp": self.ramp.state_dict()}
        return mask | {"clip_norm": self.terminal.clip_norm, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.terminal is not None:
            self.terminal.clip_norm = state["clip_norm"]
            self.monitor.load_state_dict(state.get("monitor", {}))
        if self.mask is not None:
            self.mask.load_state_dict(state.get("mask", {}))
        if self.ramp is not None:
            self.ramp.load_state_dict(state.get("ramp", {}))

    def mask_steps(
        self, steps: Sequence[int], collected: Chunk, selection: StepSelection | None = None
    ) -> Chunk:
        """Mask or weigh rows of samples that share S steps; thresholds follow the residuals of all ranks.

        Args:
            steps: S step numbers.
            collected: rows and residuals of this rank.
            selection: follows the residuals that are kept.
        """
        residuals = collected.residuals
        assert residuals is not None
        of_all = self.gather(residuals.flatten()).reshape(-1, len(steps))
        keep, keep_of_all = torch.ones_like(residuals), torch.ones_like(of_all)
        if self.mask is not None:
            self.mask.update(steps, of_all)
            keep, keep_of_all = (self.mask.keep(steps, r).to(r) for r in (residuals, of_all))
        weight = collected.rows.weight
        if self.ramp is not None:
            self.ramp.update(steps, of_all)
            weight = weight * self.ramp.weights(steps, residuals)
        if selection is not None:
            selection.update(steps, of_all, keep_of_all)
        return collected._replace(rows=replace(collected.rows, keep=keep, weight=weight))

    def _terminal_cost(self) -> TerminalCost:
        shared = self.shared
        options = GradientOptions(
            batch_size=self.sizes.reward,
            smoothing_std=shared.reward_smoothing_std,
            smoothing_samples=shared.reward_smoothing_samples,
            clip_quantile=shared.reward_clip_quantile,
        )
        around = self.around
        return around.terminal_cost(around.reward, shared.scale, options, around.tilt)
