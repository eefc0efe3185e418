"""Rows of an iteration: what the chunks of samples contribute, and the batch that is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.parts.surroundings import Gather
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of B samples, S each, before they are weighted for a mean over rows.

    Attributes:
        latents: states x, (B, S, ...).
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

    @classmethod
    def at_steps(
        cls, latents: Tensor, target: Tensor, sigmas: Sequence[float], weights: Sequence[float]
    ) -> "Rows":
        """Return rows at S noise levels that all samples share, none of them masked.

        Args:
            latents: states, (B, S, ...).
            target: velocities to regress on, (B, S, ...).
            sigmas: S noise levels.
            weights: S factors of the squared errors.
        """
        keep = target.new_ones(target.shape[:2])
        levels, factors = keep.new_tensor([list(sigmas), list(weights)])
        return cls(latents, target, levels.expand_as(keep), factors.expand_as(keep), keep)

    def to_cpu(self) -> "Rows":
        """Return the same with latents and targets, which are large, on the CPU."""
        return replace(self, latents=self.latents.cpu(), target=self.target.cpu())


class Chunk(NamedTuple):
    """The contribution of a chunk of B samples.

    Attributes:
        rows: S rows a sample.
        stats: named statistics, see reports.py, (B,) each; the first is `reward`.
        residuals: weighted squared errors of the policy before the update, (B, S); None where no mask asks.
    """

    rows: Rows
    stats: dict[str, Tensor]
    residuals: Tensor | None = None

    @classmethod
    def cat(cls, chunks: Sequence["Chunk"]) -> "Chunk":
        """Return the rows of all chunks."""
        columns = {
            field.name: torch.cat([getattr(chunk.rows, field.name) for chunk in chunks])
            for field in fields(Rows)
        }
        stats = {name: torch.cat([chunk.stats[name] for chunk in chunks]) for name in chunks[0].stats}
        residuals = [chunk.residuals for chunk in chunks if chunk.residuals is not None]
        return cls(Rows(**columns), stats, torch.cat(residuals) if residuals else None)

    def emphasised(self, place: int, factors: Tensor) -> "Chunk":
        """Return the same with the weight of row `place` of each sample times `factors` (B,)."""
        weight = self.rows.weight.clone()
        weight[:, place] *= factors
        return self._replace(rows=replace(self.rows, weight=weight))


class Swept(NamedTuple):
    """The result of a rollout and its sweep.

    Attributes:
        rows: rows of this rank's B samples.
        rewards: rewards, (B,).
        metrics: numbers to log, over all ranks.
        warnings: see `Collected`.
    """

    rows: Rows
    rewards: Tensor
    metrics: dict[str, float]
    warnings: Sequence[str]


def kept_batch(
    rows: Rows, samples: Tensor, cond: Conditioning, gather: Gather, *, all_kept: bool = False
) -> tuple[MatchingBatch, float]:
    """Return rows weighted for a mean over the kept rows of all ranks, and the share that is masked.

    Every rank returns as many rows as the rank that keeps most, at least one, so that all make
    the same number of backward passes; the surplus has weight 0.

    Args:
        rows: rows of this rank, as many as of the others.
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
