"""Logs of an iteration's numbers: metrics.jsonl (always, flushed), trackers and the progress bar."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from am_diffusers.system.files import keep_lines


class MetricsLog:
    """Writes one line an iteration; on processes other than the main one it does nothing.

    Args:
        path: the metrics.jsonl to write; lines from iteration `start` on are dropped: they are done again.
        total: iterations of the run, for the progress bar.
        start: iterations that are finished; 0 = an earlier file is replaced.
        enabled: whether this process is the one that writes.
        bar: metrics in the progress bar, by the label they have there; the last known ones, as some methods
            don't measure each in every iteration.
        track: also receives (metrics, iteration), e.g. `accelerator.log`.
    """

    def __init__(
        self,
        path: Path,
        *,
        total: int,
        start: int = 0,
        enabled: bool = True,
        bar: Mapping[str, str] | None = None,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self._in_bar, self._known = bar or {}, dict[str, float]()
        self._file = None
        if enabled:
            keep_lines(path, start)
            self._file = path.open("a", encoding="utf-8")
        self._track = track
        self._bar = tqdm(
            total=total, initial=start, desc="iterations", disable=not enabled, dynamic_ncols=True
        )

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of iteration `iteration` (from 0)."""
        if self._file is None:
            return
        self._file.write(json.dumps({"iteration": iteration, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        if self._track is not None:
            self._track(dict(metrics), iteration)
        self._known |= metrics
        self._bar.set_postfix(
            {label: f"{self._known[name]:.3g}" for label, name in self._in_bar.items() if name in self._known}
        )
        self._bar.update()

    def close(self) -> None:
        """Close the file and the bar."""
        self._bar.close()
        if self._file is not None:
            self._file.close()


def add_to(totals: dict[str, float], numbers: Mapping[str, float]) -> None:
    """Add each of `numbers` to the total of its name."""
    for name, number in numbers.items():
        totals[name] = totals.get(name, 0.0) + number
