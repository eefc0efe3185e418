"""Rows of an iteration: what the chunks of a rollout contribute, masked and weighted for the regression."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch, QuantileMask, matching_weight
from am_diffusers.methods.base import Gather
from am_diffusers.methods.parts.step_selection import Selected, StepSelection
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning


class Rows(NamedTuple):
    """What a chunk of B samples contributes at S steps.

    Attributes:
        latents: x_k, (B, S, ...).
        target: velocities to regress on, (B, S, ...).
        residuals: weighted squared errors of the policy before the update, (B, S).
        stats: see `statistics`, (B,) each.
    """

    latents: Tensor
    target: Tensor
    residuals: Tensor
    stats: dict[str, Tensor]

    def to_cpu(self) -> "Rows":
        """The same with latents and targets, which are large, on the CPU."""
        return self._replace(latents=self.latents.cpu(), target=self.target.cpu())

    @classmethod
    def cat(cls, chunks: Sequence["Rows"]) -> "Rows":
        """The rows of all chunks."""
        latents, target, residuals, stats = zip(*chunks, strict=True)
        merged = {name: torch.cat([chunk[name] for chunk in stats]) for name in stats[0]}
        return cls(torch.cat(latents), torch.cat(target), torch.cat(residuals), merged)


@dataclass(frozen=True, eq=False)
class SampleRows:
    """Rows of B samples, S each, before they are weighted for a mean over rows.

    Attributes:
        latents: states x_k, (B, S, ...).
        target: velocities to regress on, (B, S, ...).
        sigmas: noise levels, (B, S).
        weight: factors of the squared errors, (B, S).
        keep: 1, or 0 for a row that is masked, (B, S).
    """

    latents: Tensor
    target: Tensor
    sigmas: Tensor
    weight: Tensor
    keep: Tensor


@dataclass(frozen=True, eq=False)
class Swept:
    """What a rollout and its sweep gave.

    Attributes:
        rows: of this rank's B samples at the S selected steps.
        rewards: (B,).
        metrics: numbers to log, over all ranks.
        warnings: see `Collected`.
    """

    rows: SampleRows
    rewards: Tensor
    metrics: dict[str, float]
    warnings: Sequence[str]


def sample_rows(
    rows: Rows,
    table: Transitions,
    selected: Selected,
    *,
    mask: QuantileMask | None,
    gather: Gather,
    selection: StepSelection | None = None,
    weight: Callable[[Transitions, int], float] = matching_weight,
) -> SampleRows:
    """Rows of this rank's B samples with weights and mask, whose thresholds the residuals of all ranks move.

    Args:
        rows: at the S selected steps.
        table: the table of the rollout.
        selected: the steps and their factors.
        mask: None keeps every row.
        gather: concatenates a 1-D tensor over ranks.
        selection: follows the residuals of all ranks, if one was asked.
        weight: factor of the squared errors of a step.
    """
    steps, residuals = selected.steps, rows.residuals
    everywhere = gather(residuals.flatten()).reshape(-1, len(steps))
    keep, keep_everywhere = torch.ones_like(residuals), torch.ones_like(everywhere)
    if mask is not None:
        mask.update(steps, everywhere)
        keep, keep_everywhere = (mask.keep(steps, r).to(r) for r in (residuals, everywhere))
    if selection is not None:
        selection.update(steps, everywhere, keep_everywhere)
    weights = [weight(table, k) * f for k, f in zip(steps, selected.factors, strict=True)]
    sigmas, factors = keep.new_tensor([table.sigmas[steps].tolist(), weights])
    return SampleRows(rows.latents, rows.target, sigmas.expand_as(keep), factors.expand_as(keep), keep)


def kept_batch(
    rows: SampleRows, samples: Tensor, cond: Conditioning, gather: Gather, *, all_kept: bool = False
) -> tuple[MatchingBatch, float]:
    """Rows weighted for a mean over the kept rows of all ranks, and the share that is masked.

    Every rank returns as many rows as the rank that keeps most, at least one, so that all make
    the same number of backward passes; the surplus has weight 0.

    Args:
        rows: of this rank, as many as of the others.
        samples: row of `cond` each row belongs to, (B, S) int64 on the CPU.
        cond: conditioning.
        gather: concatenates a 1-D tensor over ranks.
        all_kept: there's no mask: the number of rows is known without a look at them.
    """
    keep = rows.keep.flatten()
    num_kept = gather(keep.sum()[None])
    batch = MatchingBatch(
        latents=rows.latents.flatten(0, 1),
        sigmas=rows.sigmas.flatten(),
        target=rows.target.flatten(0, 1),
        weight=rows.weight.flatten() * keep / num_kept.sum().clamp(min=1),
        samples=samples.flatten(),
        cond=cond,
    )
    masked = 1 - num_kept.sum().item() / (len(num_kept) * keep.numel())
    kept_first = keep.argsort(descending=True, stable=True)
    num_rows = len(keep) if all_kept else int(num_kept.max().clamp(min=1))
    return batch.index(kept_first[:num_rows]), masked
