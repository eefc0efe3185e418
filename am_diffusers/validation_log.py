"""Where a validation goes: its picture grid, a line of validation.jsonl, the panel of curves, the tracker."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from am_diffusers.panel import draw_panel
from am_diffusers.system.text import redact_values
from am_diffusers.training.metrics import read_lines
from am_diffusers.training.trackers import GRID, PANEL


@dataclass(frozen=True)
class ValidationLog:
    """Writes the results of validations into the output folder, on the main process.

    Attributes:
        folder: output folder of the run.
        track: receives (metrics, iteration), e.g. `accelerator.log`.
        track_images: receives (pictures by name, iteration).
    """

    folder: Path
    track: Callable[[dict[str, float], int], None]
    track_images: Callable[[Mapping[str, Image.Image], int], None]

    def write(
        self, iteration: int, metrics: dict[str, float], grid: Image.Image, shown: Mapping[str, object]
    ) -> None:
        """Write the validation of the model after `iteration` optimizer steps.

        Args:
            iteration: optimizer steps taken.
            metrics: by the names they're logged by.
            grid: the pictures.
            shown: prompts and seeds of the grid, for pictures.json beside it.
        """
        samples = self.folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples / "pictures.json").write_text(
            json.dumps(redact_values(shown), indent=1, ensure_ascii=False), "utf-8"
        )
        grid.save(samples / f"iteration-{iteration:06d}.png")
        self._append(iteration, metrics)
        panel = draw_panel(self.folder)
        self.track(metrics, iteration)
        with Image.open(panel) as picture:
            self.track_images({GRID: grid, PANEL: picture.convert("RGB")}, iteration)

    def _append(self, iteration: int, metrics: dict[str, float]) -> None:
        """A run that was resumed validates again: its line replaces those from there on."""
        path = self.folder / "validation.jsonl"
        earlier = [line for line in read_lines(path) if line["iteration"] < iteration]
        lines = [*earlier, {"iteration": iteration, **metrics}]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), "utf-8")
        os.replace(part, path)
