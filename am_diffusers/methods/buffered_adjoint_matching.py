"""Buffered Adjoint Matching: rows of past trajectories are used again ("reciprocal adjoint matching").

    every `buffer_refresh` iterations:   roll out, sweep, store rows (latents, sigma, target, weight)
    every iteration:                     the matching loss on as many rows, drawn from the last collections

The targets of lean Adjoint Matching (arXiv 2409.08861) are made of the trajectory and the base alone, so the
policy does not make them stale: only the law of the states ages, and the fixed point is that of Adjoint
Matching. Replay with closed-form bridges is that of Adjoint Sampling (arXiv 2504.11713); this version, which
stores the states of the chain itself, is a reconstruction, without importance weights (docs/theory.md,
section 9). Mask and step selection are those of the iteration that collected a row: it is not judged again.
Passes of Adjoint Matching in an iteration that collects, the regression's alone in the others, which
report no rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.adjoint_matching import AdjointMatching
from am_diffusers.methods.base import Collected, Method
from am_diffusers.methods.parts import laws
from am_diffusers.methods.parts.kept import KeptBytes, PartShare
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.replay import DiskTensors, Drawn, Replay, in_memory
from am_diffusers.methods.parts.rows import kept_batch
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.noise import LatentSpec
from am_diffusers.velocity import Conditioning

GIB = 2**30


@dataclass(frozen=True)
class BufferSettings:
    """The buffer of past trajectories.

    Attributes:
        buffer_size: samples that are kept, over all processes: a multiple of train_batch_size; the oldest go
            first.
        buffer_refresh: iterations from one rollout to the next; how often a row is trained on, on average.
        buffer_storage: where latents and targets are kept: cpu (main memory), or disk (files in output_dir,
            mapped into memory).
        buffer_max_gb: most that the buffer may hold over all processes, in GiB: buffer_size samples, which
            are in every checkpoint, the train_batch_size that fall out while an iteration lasts, and twice
            as many for the rows that are drawn, always in main memory.
    """

    buffer_size: int = 64
    buffer_refresh: int = 4
    buffer_storage: Literal["cpu", "disk"] = "cpu"
    buffer_max_gb: float = 8.0

    def __post_init__(self) -> None:
        require(
            self,
            [
                (self.buffer_size >= 1, "buffer_size", "at least 1"),
                (1 <= self.buffer_refresh <= 1000, "buffer_refresh", "from 1 to 1000"),
                (self.buffer_max_gb > 0, "buffer_max_gb", "positive"),
            ],
        )


class BufferedAdjointMatching(Method[MatchingBatch]):
    """Adjoint Matching on rows from a buffer of past trajectories.

    Raises:
        ValueError: if the adjoint is the full one, whose targets the policy makes stale, or the buffer holds
            no whole number of iterations.
    """

    title, paper = "Buffered Adjoint Matching", "2409.08861"
    Settings = BufferSettings
    reads = AdjointMatching.reads
    needs_reward_gradient = True
    aims_at_tilt = True
    finds_sizes = True
    free = ("buffer_storage", "buffer_max_gb")
    own: BufferSettings

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        if shared.adjoint != "lean":
            raise ValueError(
                "--adjoint must be lean with a buffer: full adjoints depend on the policy, so that stored "
                f"ones would be outdated, got {shared.adjoint}"
            )
        batch, size = self.sizes.batch, self.own.buffer_size
        if batch is None or size < batch or size % batch:
            raise ValueError(
                f"--buffer_size must be a multiple of train_batch_size, {batch}: it is filled and emptied a "
                f"collection at a time, got {size}"
            )
        collections = -(-around.iterations // self.period)
        self.inner = AdjointMatching(replace(around, iterations=collections), shared)
        self.generations = size // batch
        store = DiskTensors(around.folder) if self.own.buffer_storage == "disk" else in_memory
        self.replay = Replay(self.generations, store)
        self._iteration, self._collected = 0, 0

    @classmethod
    def law(cls, shared: SharedSettings, own: BufferSettings) -> str:
        """Return the tilt, or why it isn't; see `Method.law`."""
        return laws.of_the_tilt(shared)

    @classmethod
    def cautions(cls, shared: SharedSettings, own: BufferSettings) -> list[str]:
        """Say if an ODE tail takes the tilt away; see `Method.cautions`."""
        return laws.cautions_of_the_tilt(shared)

    @property
    def period(self) -> int:
        """Iterations from one rollout to the next."""
        return self.own.buffer_refresh

    @property
    def collector(self) -> Method:
        """The Adjoint Matching that makes the rows."""
        return self.inner

    def kept_bytes(self, rows: int, latents: LatentSpec) -> KeptBytes:
        """Return the size of a full buffer of latents and targets with `rows` rows a sample."""
        assert self.sizes.batch is not None
        one = self.sizes.batch * rows * 2 * torch.Size(latents.shape).numel() * latents.dtype.itemsize
        return KeptBytes(self.generations * one, one, 2 * one, self.own.buffer_storage == "cpu")

    def check_size(self, rows: int, latents: LatentSpec) -> None:
        """Refuse a buffer beyond `buffer_max_gb`, see `Method.check_size`."""
        size, limit = self.kept_bytes(rows, latents), self.own.buffer_max_gb
        if size.peak / GIB > limit:
            held = size.falling_out + size.drawn
            raise ValueError(
                f"the buffer would hold {size.peak / GIB:.3g} GiB over all processes, more than "
                f"--buffer_max_gb {limit:g}: {size.stored / GIB:.3g} GiB that it keeps, also in every "
                f"checkpoint, and {held / GIB:.3g} GiB for the collection that falls out and the rows that "
                "are drawn: lower --buffer_size, --loss_steps or --train_batch_size, or raise "
                "--buffer_max_gb (--buffer_storage disk keeps all but the drawn rows out of main memory)"
            )

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """Return rows drawn from the buffer, after a collection if one is due; raises as Adjoint Matching.

        The conditioning and the prompts it is of are not used without a collection.
        """
        rewards, metrics, warnings = torch.empty(0), dict[str, float](), ()
        if not len(self.replay) or self._iteration - self._collected >= self.period:
            rewards, metrics, warnings = self._refresh(cond, generators, shared)
        examples, of_rows = self._draw(generators)
        if torch.device(self.latents.device).type == "cuda":
            examples = examples.pin_memory()
        self._iteration += 1
        return Collected(examples, rewards, metrics | of_rows, warnings)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the share of the matching loss that these rows contribute, see `Method.loss`."""
        return self.inner.loss(example)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of Adjoint Matching, iterations done and the one of the last collection."""
        return {
            "inner": self.inner.state_dict(),
            "iteration": self._iteration,
            "collected": self._collected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.inner.load_state_dict(state["inner"])
        self._iteration, self._collected = state["iteration"], state["collected"]

    def local_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the buffer."""
        return {"generations": self.replay.state()}

    def load_local_state_dicts(self, states: Sequence[dict[str, Any]], share: PartShare) -> None:
        """Restore this rank's part of the buffer, see `Method.load_local_state_dicts`."""
        self.replay.load([state["generations"] for state in states], share)

    def _refresh(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> tuple[Tensor, dict[str, float], Sequence[str]]:
        """Collect, and let the oldest go; return rewards, metrics and warnings of the collection."""
        swept = self.inner.sweep(cond, generators, shared)
        self.replay.push(swept.rows, cond.prompts, self._iteration)
        self._collected = self._iteration
        return swept.rewards, swept.metrics, swept.warnings

    def _draw(self, generators: Sequence[torch.Generator]) -> tuple[MatchingBatch, dict[str, float]]:
        """Return rows to train on, and what there is to log; the copy they were drawn into is let go."""
        drawn = self.replay.draw(generators)
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(drawn.prompts))}
        samples = torch.tensor([prompts[prompt] for prompt in drawn.prompts])
        cond = self.around.encode(list(prompts))
        examples, masked = kept_batch(
            drawn.rows, samples, cond, self._gather, all_kept=self.inner.mask is None
        )
        return examples, self._ages(drawn) | {"masked": masked}

    def _gather(self, values: Tensor) -> Tensor:
        """Exchange small numbers of what lies on the CPU where the processes exchange."""
        return self.gather(values.to(self.latents.device)).cpu()

    def _ages(self, drawn: Drawn) -> dict[str, float]:
        """Return how many iterations ago the drawn rows were collected, and the size of the buffer."""
        ages = (self._iteration - drawn.iterations).float()
        mean, largest = self._gather(torch.stack([ages.mean(), ages.max()])).view(-1, 2).T
        number = len(self.replay) * len(mean) * len(ages)
        return {
            "buffer/age_mean": mean.mean().item(),
            "buffer/age_max": largest.max().item(),
            "buffer/samples": float(number),
        }
