"""Signals that ask a run to stop: noted when they come, polled by the work."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


class StopSignal:
    """Flag that SIGTERM, SIGINT and SIGUSR1 set and the work polls.

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
