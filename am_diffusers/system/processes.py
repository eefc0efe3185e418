"""Work of several processes: signals and failures of one reach all of them, and nobody waits for ever.

Every exchange between processes is a method of `Processes`. Before each, all processes exchange a status; one
that was told to stop or that failed leaves its work, tells the others its status and the name of its error in
their next exchange, and all leave together. So a checkpoint after SIGTERM is written by processes that agree
on the iteration. Statuses go over the CPU: a process whose card is full or broken can tell its own, and one
that waits for another's long work needs no time limit; tensors follow when all are there.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from am_diffusers.system.failures import NonFiniteError
from am_diffusers.system.signals import Interrupted, StopSignal

Value = TypeVar("Value")
LONGEST_NAME = 64
"""Bytes of an error's name that the other processes are told."""
PATIENCE = timedelta(days=30)
"""How long processes wait for one that verifies, uploads or has more to do; one that dies is noticed."""


class PeerError(ValueError):
    """Another process failed; the message names its error, its own message says why."""


class PeerNotFiniteError(NonFiniteError):
    """Another process met something that isn't finite; its own message names it."""


def is_secondhand(error: BaseException | None) -> bool:
    """Tell if an exception came from another process, which has the first-hand account."""
    while error is not None:
        if isinstance(error, PeerError | PeerNotFiniteError):
            return True
        error = error.__cause__ or error.__context__
    return False


class Status(IntEnum):
    """State that a process tells the others; the largest decides."""

    FINE = 0
    STOPPED = 1
    NOT_FINITE = 2
    FAILED = 3


class Verdict(NamedTuple):
    """The outcome that all processes agreed on in an exchange.

    Attributes:
        status: the worst of all.
        error: name of the first error with that status; empty if it is none.
    """

    status: Status
    error: str = ""


class Processes:
    """The processes of a run, as the work sees them.

    Args:
        accelerator: communication between the processes.
        stop: flag of this process.
        lockstep: whether all must make the same passes in the same order: then none leaves between two
            exchanges because of a signal.
    """

    def __init__(
        self, accelerator: Accelerator, stop: StopSignal | None = None, *, lockstep: bool = False
    ) -> None:
        self.accelerator, self.stop = accelerator, stop or StopSignal()
        self.number, self.index = accelerator.num_processes, accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        self.lockstep = lockstep
        self._stoppable = True

    def gather(self, values: Tensor) -> Tensor:
        """Return a 1-D tensor of the same length on each process, concatenated in process order."""
        self.agree()
        return self.accelerator.gather(values)  # pyright: ignore[reportReturnType]

    def gather_objects(self, values: list[Value]) -> list[Value]:
        """Return lists of any length, concatenated in process order, on all processes."""
        self.agree()
        return gather_object(values)

    def sum(self, values: Tensor) -> Tensor:
        """Return a tensor summed over the processes, on their device."""
        values = values.to(self.accelerator.device)  # before all agree: it may fail
        self.agree()
        return self.accelerator.reduce(values, "sum")  # pyright: ignore[reportReturnType]

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the sums over the processes of numbers that have the same names on all."""
        self.agree()
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        sums = values if self.number == 1 else self._gather_numbers(values).view(self.number, -1).sum(0)
        return dict(zip(numbers, sums.tolist(), strict=True))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients of `parameters` by their sums; a missing one counts as 0."""
        if self.number == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        parts = self.sum(flat).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def agree(self) -> None:
        """Wait for all; raise on every process if one failed, or was stopped where that is possible."""
        stopped = self.stop.number and self._stoppable
        self._raise(self._exchange(Status.STOPPED if stopped else Status.FINE, ""))

    @contextmanager
    def together(self, *, stoppable: bool = True) -> Iterator[None]:
        """Work that all processes finish, or none: an exception of one ends it on all. Such blocks may nest.

        Args:
            stoppable: whether a signal ends it; otherwise the signal waits until afterwards.

        Raises:
            Interrupted: one was told to stop.
            NonFiniteError: one met something that isn't finite.
            PeerError: another one failed otherwise; on that one, its own exception.
        """
        outside, began = self._stoppable, next(_clock)
        self._stoppable = stoppable and outside
        try:
            yield
            self.agree()
        except Exception as error:
            if not _told_since(began, error):
                _tell(error)
                own = _status_of(error)
                verdict = self._exchange(own, type(error).__name__)
                if own < verdict.status:
                    self._raise(verdict)
            raise
        finally:
            self._stoppable = outside

    def on_main(self, action: Callable[[], Value]) -> Value | None:
        """Run `action` on the main process while the others wait; its failure is theirs, no signal ends it.

        Returns:
            What it returned, on the main process; None on the others.
        """
        with self.together(stoppable=False):
            return action() if self.is_main else None

    def from_main(self, action: Callable[[], Value]) -> Value:
        """Run `action` like `on_main`, and return what it returned on all processes.

        Args:
            action: returns something that can be pickled.
        """
        made = [self.on_main(action)]
        if self.number > 1:
            broadcast_object_list(made)
        return made[0]  # pyright: ignore[reportReturnType]  (it is the main process's)

    def poll(self) -> None:
        """Raise `Interrupted` if a signal came to this process; to be called between network passes."""
        if self._stoppable and not self.lockstep:
            self.stop.poll()

    def _exchange(self, own: Status, error: str) -> Verdict:
        """Tell the others this process's status and, if one failed, the names of the errors."""
        if self.number == 1:
            return Verdict(own, error)
        statuses = self._gather_numbers(torch.tensor([own.value])).tolist()
        worst = Status(max(statuses))
        if worst <= Status.STOPPED:
            return Verdict(worst)
        name = torch.tensor(list(error.encode()[:LONGEST_NAME].ljust(LONGEST_NAME)))
        names, first = bytes(self._gather_numbers(name).tolist()), statuses.index(worst) * LONGEST_NAME
        return Verdict(worst, names[first : first + LONGEST_NAME].decode(errors="ignore").strip())

    @cached_property
    def _statuses(self) -> dist.ProcessGroup:
        """Group of all processes on the CPU; made by the first exchange."""
        return dist.new_group(backend="gloo", timeout=PATIENCE)  # pyright: ignore[reportReturnType]

    def _gather_numbers(self, numbers: Tensor) -> Tensor:
        parts = [torch.empty_like(numbers) for _ in range(self.number)]
        dist.all_gather(parts, numbers, group=self._statuses)
        return torch.cat(parts)

    def _raise(self, verdict: Verdict) -> None:
        if verdict.status == Status.FINE:
            return
        if verdict.status == Status.STOPPED:
            error: Exception = Interrupted(self.stop.number)
        elif verdict.status == Status.NOT_FINITE:
            error = PeerNotFiniteError(
                f"another process met something that isn't finite ({verdict.error}): see its message"
            )
        else:
            error = PeerError(f"another process failed with {verdict.error}: see its message")
        _tell(error)
        raise error


_clock = itertools.count()


def _tell(error: BaseException) -> None:
    """Note on an exception when the other processes were told of it."""
    vars(error)["told"] = next(_clock)


def _told_since(began: int, error: BaseException | None) -> bool:
    """Tell if the others were told of an exception, or of one that it came from, since a block began."""
    while error is not None and vars(error).get("told", -1) < began:
        error = error.__cause__ or error.__context__
    return error is not None


def _status_of(error: Exception) -> Status:
    if isinstance(error, Interrupted):
        return Status.STOPPED
    return Status.NOT_FINITE if isinstance(error, NonFiniteError) else Status.FAILED


def share(samples: int, processes: Processes) -> Sequence[int]:
    """Return the samples of an iteration that this process makes."""
    size = samples // processes.number
    return range(processes.index * size, (processes.index + 1) * size)


def disband() -> None:
    """Take the process group down where all leave together; threads of NCCL may hang at the end otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()
