"""A first-in first-out buffer of training rows, from which an iteration draws as many as a rollout makes.

A *generation* is what one collection gave: B samples a rank, each with S rows. From G of them an iteration
draws, for sample b and row s, the generation at random:

    row (b, s) of the iteration = row (b, s) of generation g[b, s],     g[b, s] ~ uniform on 0 .. G-1

Every stored row is drawn with probability 1 / G, so means over drawn rows are unbiased estimates of means
over the buffer; places (b, s) are strata, so an iteration has each denoising step as often as a rollout has.
As g[b, s] follows from the generator of sample b, any number of processes draws the same rows, each as many.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.methods.parts.rows import Rows

Store = Callable[[Tensor], Tensor]
"""Where latents and targets are kept: gives back an equal tensor there, itself if it is there already."""


def in_memory(tensor: Tensor) -> Tensor:
    """`Store` on the CPU: the tensor with memory of its own."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


@dataclass(frozen=True, eq=False)
class Generation:
    """Samples of one collection on this rank; nothing is ever written to it.

    Attributes:
        rows: rows of B samples, on the CPU.
        prompts: prompts of the samples, (B,).
        iteration: when they were collected.
    """

    rows: Rows
    prompts: tuple[str, ...]
    iteration: int


class Drawn(NamedTuple):
    """Rows of an iteration.

    Attributes:
        rows: (B, S) of them, on the CPU.
        prompts: prompt of each row, B x S.
        iterations: when each was collected, (B, S) int64.
    """

    rows: Rows
    prompts: list[str]
    iterations: Tensor


class Replay:
    """The last `generations` collections of this rank.

    Args:
        generations: how many are kept, the oldest go first.
        store: where latents and targets go.
    """

    def __init__(self, generations: int, store: Store = in_memory) -> None:
        self.limit, self.store = generations, store
        self._generations: tuple[Generation, ...] = ()

    def __len__(self) -> int:
        return len(self._generations)

    def push(self, rows: Rows, prompts: Sequence[str], iteration: int) -> None:
        """Store a collection; drop the oldest beyond the limit.

        Raises:
            ValueError: if it has other shapes than what is stored.
        """
        new = Generation(self._stored(rows), tuple(prompts), iteration)
        if self._generations:
            self._expect(tuple(new.rows.latents.shape))
        self._generations = (*self._generations, new)[-self.limit :]

    def draw(self, generators: Sequence[torch.Generator]) -> Drawn:
        """Return a row for each place (b, s) of a generation, drawn with the generator of sample b.

        Args:
            generators: generators of the B samples of this rank.

        Raises:
            ValueError: if what is stored has another number of samples.
        """
        generations = self._generations
        shape = generations[0].rows.latents.shape
        self._expect((len(generators), *shape[1:]))
        choice = torch.stack(
            [torch.randint(len(generations), shape[1:2], generator=each) for each in generators]
        )
        names = vars(generations[0].rows)
        picked = {name: torch.empty_like(value) for name, value in names.items()}
        for g, generation in enumerate(generations):
            where = choice == g
            for name, value in vars(generation.rows).items():
                picked[name][where] = value[where]
        chosen = [(b, generations[g]) for b, row in enumerate(choice.tolist()) for g in row]
        iterations = torch.tensor([generation.iteration for generation in generations])[choice]
        return Drawn(Rows(**picked), [each.prompts[b] for b, each in chosen], iterations)

    def state(self) -> list[dict[str, Any]]:
        """References to what is stored, the oldest first; later calls don't change it."""
        return [
            {"rows": dict(vars(each.rows)), "prompts": list(each.prompts), "iteration": each.iteration}
            for each in self._generations
        ]

    def load(self, states: Sequence[list[dict[str, Any]]], share: PartShare) -> None:
        """This rank's share of what `state` returned on the ranks `share.needed`, in rank order.

        Raises:
            ValueError: if its samples can't be shared evenly.
        """
        generations = []
        for number in range(len(states[0]))[-self.limit :]:
            parts = [state[number] for state in states]
            prompts = [prompt for part in parts for prompt in part["prompts"]]
            mine = share.rows(len(prompts))
            rows = {
                name: torch.cat([part["rows"][name] for part in parts])[mine] if len(parts) > 1 else own[mine]
                for name, own in parts[0]["rows"].items()
            }
            generation = Generation(self._stored(Rows(**rows)), tuple(prompts[mine]), parts[0]["iteration"])
            generations.append(generation)
        self._generations = tuple(generations)

    def _expect(self, got: tuple[int, ...]) -> None:
        expected = tuple(self._generations[-1].rows.latents.shape)
        if got != expected:
            raise ValueError(
                f"the buffer holds rows {expected} (samples, steps, latent) a process, this run makes {got}: "
                "put back the settings with which it was filled, or choose another output_dir"
            )

    def _stored(self, rows: Rows) -> Rows:
        """Return the rows on the CPU, what is large in the store."""
        small = (in_memory(tensor) for tensor in (rows.sigmas, rows.weight, rows.keep))
        return Rows(self.store(rows.latents), self.store(rows.target), *small)


PREFIX = ".tensors-"


@dataclass(frozen=True)
class DiskTensors:
    """Puts tensors into files of a folder.

    A file loses its name as soon as it is mapped: its room is free again when the tensor is, or when the
    process ends, however it does.

    Attributes:
        folder: on a local disk, with room for all tensors that are kept.
    """

    folder: Path

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return an equal tensor on the disk, not to be written to; itself if it is one of this folder.

        Raises:
            ValueError: if there's no room; says what to do.
        """
        folder = self.folder.resolve()
        name = tensor.untyped_storage().filename
        if name is not None and Path(name).parent == folder:
            return tensor
        values = tensor.detach().cpu().contiguous()
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        try:
            # Written, not mapped: a full disk is then an error here, by Python's own file also in the last
            # few bytes (numpy's `tofile` loses that one, and mapping would fill up with zeros).
            with os.fdopen(handle, "wb") as file:
                file.write(values.flatten().view(torch.uint8).numpy().data)
            mapped = torch.from_file(name, shared=True, size=values.numel(), dtype=values.dtype)
        except OSError as error:
            raise ValueError(
                f"{self.folder}: no room for the buffer ({error}): free some space, lower --buffer_size, or "
                "keep it in memory with --buffer_storage cpu"
            ) from error
        finally:
            os.unlink(name)
        return mapped.view(values.shape)

    def clean(self) -> None:
        """Remove what processes left that were killed between making a file and mapping it."""
        for path in self.folder.glob(f"{PREFIX}*"):
            path.unlink(missing_ok=True)
