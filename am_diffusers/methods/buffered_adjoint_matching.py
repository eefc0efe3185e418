"""Buffered Adjoint Matching: rows of past trajectories are used again ("reciprocal adjoint matching").

    every `refresh` iterations:   roll out, sweep, store rows (latents, sigma, target, weight)
    every iteration:              the matching loss on as many rows, drawn from the last collections

The targets of lean Adjoint Matching (arXiv 2409.08861) are made of the trajectory and the base alone, so the
policy does not make them stale: only the law of the states ages. At the optimum both agree, so the fixed
point is that of Adjoint Matching; away from it, rows are up to `refresh` x `generations` iterations old, as
logged (`buffer/age_mean`, `buffer/age_max`). Each row is trained on `refresh` times on average. Replay with
closed-form bridges is that of Adjoint Sampling (arXiv 2504.11713); this version, which stores the states of
the chain itself, is a reconstruction. No importance weights: those tried elsewhere gave nothing measurable.

Known deviations and bias: the mask (`mask_quantile`) is a property of the residuals when a row is collected.
It is stored with the row and not judged again: a row that was masked is never trained on, one that was kept
always may be. Its bias is that of Adjoint Matching. Step selection, too, follows residuals at collection.

Passes through the network: those of Adjoint Matching in an iteration that collects, the regression's alone in
the others, which report no rewards, path KL or adjoint norms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.adjoint_matching import AdjointMatching
from am_diffusers.methods.base import Collected, Method, PartShare
from am_diffusers.methods.parts.replay import Drawn, Replay, Store, in_memory
from am_diffusers.methods.parts.rows import kept_batch
from am_diffusers.noise import LatentSpec
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class BufferSettings:
    """Choices of the buffer.

    Attributes:
        generations: collections that are kept.
        refresh: iterations from one collection to the next; how often a row is trained on, on average.

    Raises:
        ValueError: if a number is below 1.
    """

    generations: int = 4
    refresh: int = 4

    def __post_init__(self) -> None:
        if min(self.generations, self.refresh) < 1:
            raise ValueError(f"expected generations and refresh of at least 1, got {self}")


class BufferedAdjointMatching(Method[MatchingBatch]):
    """Adjoint Matching on rows from a buffer of past trajectories.

    Args:
        inner: makes the trajectories and targets.
        encode: prompts to their conditioning; rows are stored with their prompts alone.
        settings: size and refreshment of the buffer.
        store: where latents and targets are kept, see `replay.Store`.

    Raises:
        ValueError: if the adjoint is the full one, whose targets the policy makes stale.
    """

    needs_reward_gradient = True

    def __init__(
        self,
        inner: AdjointMatching,
        encode: Callable[[Sequence[str]], Conditioning],
        settings: BufferSettings,
        store: Store = in_memory,
    ) -> None:
        if inner.settings.adjoint != "lean":
            raise ValueError(
                "a buffer needs adjoint='lean': full adjoints depend on the policy and age with it"
            )
        self.inner, self.encode, self.settings = inner, encode, settings
        self.replay = Replay(settings.generations, store)
        self._iteration, self._collected = 0, 0

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """Rows drawn from the buffer, after a collection if one is due; raises as `AdjointMatching.collect`.

        The conditioning and the prompts it is of are not used without a collection.
        """
        rewards, metrics, warnings = torch.empty(0), dict[str, float](), ()
        if not len(self.replay) or self._iteration - self._collected >= self.settings.refresh:
            rewards, metrics, warnings = self._refresh(cond, generators, shared)
        examples, of_rows = self._draw(generators)
        if torch.device(self.inner.latents.device).type == "cuda":
            examples = examples.pin_memory()
        self._iteration += 1
        return Collected(examples, rewards, metrics | of_rows, warnings)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Share of the matching loss that these rows contribute, see `Method.loss`."""
        return self.inner.loss(example)

    def state_dict(self) -> dict[str, Any]:
        """State of Adjoint Matching, iterations done and the one of the last collection."""
        return {
            "inner": self.inner.state_dict(),
            "iteration": self._iteration,
            "collected": self._collected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.inner.load_state_dict(state["inner"])
        self._iteration, self._collected = state["iteration"], state["collected"]

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's part of the buffer."""
        return {"generations": self.replay.state()}

    def load_local_state_dicts(self, states: Sequence[dict[str, Any]], share: PartShare) -> None:
        """Restores this rank's part of the buffer, see `Method.load_local_state_dicts`."""
        self.replay.load([state["generations"] for state in states], share)

    def _refresh(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> tuple[Tensor, dict[str, float], Sequence[str]]:
        """Collect, and let the oldest go; rewards, metrics and warnings of the collection."""
        swept = self.inner.sweep(cond, generators, shared)
        self.replay.push(swept.rows, cond.prompts, self._iteration)
        self._collected = self._iteration
        return swept.rewards, swept.metrics, swept.warnings

    def _draw(self, generators: Sequence[torch.Generator]) -> tuple[MatchingBatch, dict[str, float]]:
        """Rows to train on, and what there is to log of them; the copy they were drawn into is let go."""
        drawn = self.replay.draw(generators)
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(drawn.prompts))}
        samples = torch.tensor([prompts[prompt] for prompt in drawn.prompts])
        examples, masked = kept_batch(
            drawn.rows, samples, self.encode(list(prompts)), self._gather, all_kept=self.inner.mask is None
        )
        return examples, self._ages(drawn) | {"masked": masked}

    def _gather(self, values: Tensor) -> Tensor:
        """Small numbers of what lies on the CPU, exchanged where the processes exchange."""
        return self.inner.gather(values.to(self.inner.latents.device)).cpu()

    def _ages(self, drawn: Drawn) -> dict[str, float]:
        """How many iterations ago the drawn rows of all ranks were collected; the size of the buffer."""
        ages = (self._iteration - drawn.iterations).float()
        mean, largest = self._gather(torch.stack([ages.mean(), ages.max()])).view(-1, 2).T
        number = len(self.replay) * len(mean) * len(ages)
        return {
            "buffer/age_mean": mean.mean().item(),
            "buffer/age_max": largest.max().item(),
            "buffer/samples": float(number),
        }


class BufferBytes(NamedTuple):
    """Bytes of latents and targets over all ranks; what else a row has is a few numbers.

    Attributes:
        stored: those that the buffer keeps, also in a checkpoint.
        falling_out: the oldest collection, kept where it lies until the iteration that replaced it has
            succeeded.
        drawn: in main memory, rows as they are drawn and the copy of those to train on (then in its place,
            for a GPU, a pinned one).
    """

    stored: int
    falling_out: int
    drawn: int

    @property
    def peak(self) -> int:
        """Most that is held at a time, in an iteration that collects."""
        return self.stored + self.falling_out + self.drawn


def buffer_bytes(collection: int, generations: int, rows: int, latents: LatentSpec) -> BufferBytes:
    """Size of a full buffer.

    Args:
        collection: samples of a collection, over all ranks.
        generations: collections that are kept.
        rows: of a sample.
        latents: shape and dtype of the latents.
    """
    one = collection * rows * 2 * torch.Size(latents.shape).numel() * latents.dtype.itemsize
    return BufferBytes(generations * one, one, 2 * one)
