"""Rows of an iteration: what the chunks of a rollout contribute, masked and weighted for the regression."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch, QuantileMask, matching_weight
from am_diffusers.methods.base import Gather
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


def masked_batch(
    rows: Rows,
    table: Transitions,
    steps: Sequence[int],
    cond: Conditioning,
    mask: QuantileMask | None,
    gather: Gather,
) -> tuple[MatchingBatch, float]:
    """Rows at steps of a stochastic table, with its sigmas and weights: see `weighted_batch`.

    Args:
        rows: of this rank's B samples.
        table: the table of the rollout.
        steps: the S steps that are trained on.
        cond: conditioning of the B samples.
        mask: its thresholds are moved by the residuals of all ranks; None keeps every row.
        gather: concatenates a 1-D tensor over ranks.
    """
    per_step = [[table.sigmas[k], matching_weight(table, k)] for k in steps]
    return weighted_batch(rows, rows.residuals.new_tensor(per_step).T, steps, cond, mask, gather)


def weighted_batch(
    rows: Rows,
    sigmas_and_weights: Tensor,
    steps: Sequence[int],
    cond: Conditioning,
    mask: QuantileMask | None,
    gather: Gather,
) -> tuple[MatchingBatch, float]:
    """Rows weighted for a mean over the kept rows of all ranks, and the share that is masked.

    Every rank returns as many rows as the rank that keeps most, at least one, so that all make
    the same number of backward passes; the surplus has weight 0.

    Args:
        rows: of this rank's B samples.
        sigmas_and_weights: noise levels and factors in the loss, (2, S) or (2, B, S).
        steps: names of the S steps, for the mask.
        cond: conditioning of the B samples.
        mask: its thresholds are moved by the residuals of all ranks; None keeps every row.
        gather: concatenates a 1-D tensor over ranks.
    """
    everywhere = gather(rows.residuals.flatten()).reshape(-1, len(steps))
    keep, keep_everywhere = torch.ones_like(rows.residuals), torch.ones_like(everywhere)
    num_rows = keep.numel()
    if mask is not None:
        mask.update(steps, everywhere)
        keep, keep_everywhere = (mask.keep(steps, r).to(r) for r in (rows.residuals, everywhere))
        num_rows = int(keep_everywhere.reshape(-1, keep.numel()).sum(1).max().clamp(min=1))
    num_kept = keep_everywhere.sum()
    sigmas, weight = (values.expand_as(keep).flatten() for values in sigmas_and_weights)
    batch = MatchingBatch(
        latents=rows.latents.flatten(0, 1),
        sigmas=sigmas,
        target=rows.target.flatten(0, 1),
        weight=weight * keep.flatten() / num_kept.clamp(min=1),
        samples=torch.arange(len(cond)).repeat_interleave(len(steps)),
        cond=cond,
    )
    kept_first = keep.flatten().argsort(descending=True, stable=True)
    return batch.index(kept_first[:num_rows]), 1 - num_kept.item() / everywhere.numel()
