"""Doing things together: signals and failures of one process reach all of them, and nobody waits for ever.

Every collective operation of a run goes through `Processes`. Before each, all processes exchange a status;
one that was told to stop or that failed leaves its work, tells the others its status in their next exchange,
and all leave together. So a checkpoint after SIGTERM is written by processes that agree on the iteration.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from am_diffusers.system.failures import NonFiniteError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """A signal asked the run to stop.

    Attributes:
        number: the signal's number, or 0 if another process got it.
    """

    def __init__(self, number: int = 0) -> None:
        name = signal.Signals(number).name if number else "a signal to another process"
        super().__init__(f"stopped by {name}")
        self.number = number


class PeerError(ValueError):
    """Another process failed; its own message says why."""


class PeerNotFiniteError(NonFiniteError):
    """Another process met something that isn't finite; its own message names it."""


def is_secondhand(error: BaseException | None) -> bool:
    """Whether an exception came from another process, which has the first-hand account."""
    while error is not None:
        if isinstance(error, PeerError | PeerNotFiniteError):
            return True
        error = error.__cause__ or error.__context__
    return False


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the work polls.

    Schedulers signal all processes of a job and launchers hand theirs on, so the same stop may come twice:
    only a second SIGINT, a person's, acts as usual, and not right after the first.

    Args:
        patience: seconds after the first signal before a SIGINT acts as usual.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.number, self.patience = 0, patience
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; afterwards the previous handlers are back."""
        previous = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.number and time.monotonic() - self._since > self.patience:
                raise KeyboardInterrupt
            if not self.number:
                self.number, self._since = number, time.monotonic()

        try:
            for number in SIGNALS:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def poll(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.number:
            raise Interrupted(self.number)


class Status(IntEnum):
    """What a process tells the others; the largest decides."""

    FINE = 0
    STOPPED = 1
    NOT_FINITE = 2
    FAILED = 3


class Processes:
    """The processes of a run, as the work sees them.

    Args:
        accelerator: their communication.
        stop: the flag of this process.
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
        self._left = False  # whether the others know already that this block is over
        self._stoppable = True

    def gather(self, values: Tensor) -> Tensor:
        """A 1-D tensor of the same length on each process, concatenated in process order."""
        self.agree()
        return self.accelerator.gather(values)  # pyright: ignore[reportReturnType]

    def sum(self, values: Tensor) -> Tensor:
        """A tensor summed over the processes, on their device."""
        self.agree()
        values = values.to(self.accelerator.device)
        return self.accelerator.reduce(values, "sum")  # pyright: ignore[reportReturnType]

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Numbers, of the same names on all processes, summed over them."""
        sums = self.sum(torch.tensor(list(numbers.values()), dtype=torch.float64))
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
        self._raise(self._exchange(Status.STOPPED if stopped else Status.FINE))

    @contextmanager
    def together(self, *, stoppable: bool = True) -> Iterator[None]:
        """Work that all processes finish, or none: an exception of one ends it on all.

        Args:
            stoppable: whether a signal ends it; otherwise it waits until afterwards.

        Raises:
            Interrupted: one was told to stop.
            NonFiniteError: one met something that isn't finite.
            PeerError: another one failed otherwise; on that one, its own exception.
        """
        self._left, self._stoppable = False, stoppable
        try:
            yield
            self.agree()
        except Exception as error:
            if not self._left:
                own = _status_of(error)
                worst = self._exchange(own)
                if own < worst:
                    self._raise(worst)
            raise
        finally:
            self._stoppable = True

    def on_main(self, action: Callable[[], object]) -> None:
        """`action` on the main process while the others wait, not to be stopped; its failure is theirs."""
        with self.together(stoppable=False):
            if self.is_main:
                action()

    def poll(self) -> None:
        """Raise `Interrupted` if a signal came to this process; to be called between network passes."""
        if self._stoppable and not self.lockstep:
            self.stop.poll()

    def _exchange(self, own: Status) -> Status:
        if self.number == 1:
            return own
        mine = torch.tensor([int(own)], device=self.accelerator.device)
        return Status(int(self.accelerator.gather(mine).max()))  # pyright: ignore[reportAttributeAccessIssue]

    def _raise(self, worst: Status) -> None:
        if worst == Status.FINE:
            return
        self._left = True
        if worst == Status.STOPPED:
            raise Interrupted(self.stop.number)
        if worst == Status.NOT_FINITE:
            raise PeerNotFiniteError("another process met something that isn't finite; its message names it")
        raise PeerError("another process failed; its message says why")


def _status_of(error: Exception) -> Status:
    if isinstance(error, Interrupted):
        return Status.STOPPED
    return Status.NOT_FINITE if isinstance(error, NonFiniteError) else Status.FAILED


def check_joined(accelerator: Accelerator) -> None:
    """Raise ValueError if several processes were launched that don't know of each other.

    Each would do all of the work, in the same folder.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}: "
            "on a CPU set ACCELERATE_USE_CPU=true"
        )


def share(samples: int, processes: Processes) -> Sequence[int]:
    """The samples of an iteration that this process makes."""
    size = samples // processes.number
    return range(processes.index * size, (processes.index + 1) * size)
