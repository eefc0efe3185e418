"""The loop of a sampler: iterations, metrics, checkpoints; a run that was killed goes on where it was."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from am_diffusers.noise import generator_for
from am_diffusers.samplers.base import Sampler
from am_diffusers.samplers.metrics import path_weights
from am_diffusers.system.files import keep_lines, write_json, write_whole
from am_diffusers.system.signals import StopSignal

CHECKPOINT, METRICS, OPTIONS = "checkpoint.pt", "metrics.jsonl", "options.json"
CHECKED_PATHS = 500
"""Paths whose weights are logged at a checkpoint."""


@dataclass
class Progress:
    """Progress of a run, over all its restarts.

    Attributes:
        iterations: done.
        seconds: CPU seconds of this process and those before it, up to the last checkpoint.
    """

    iterations: int = 0
    seconds: float = 0.0


def check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Check that a folder is new, or of a run with the same options.

    Raises:
        ValueError: it holds other files or another run; names the options that differ.
    """
    file = folder / OPTIONS
    if not file.exists():
        if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise ValueError(f"--output_dir {folder} has files, but of no run: choose another folder")
        return
    try:
        before = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another --output_dir") from error
    changed = sorted(name for name in options.keys() | before.keys() if options.get(name) != before.get(name))
    if changed:
        differences = ", ".join(f"{name} was {before.get(name)}" for name in changed)
        raise ValueError(
            f"--output_dir {folder} has a run with other options ({differences}): choose another folder, or "
            "give those to resume it"
        )


def train(
    sampler: Sampler,
    folder: Path,
    options: dict[str, Any],
    stop: StopSignal,
    progress: Progress,
    *,
    every: int,
) -> Iterable[str]:
    """Train a sampler in a folder; resume from its checkpoint if there is one.

    Args:
        sampler: new, its settings those of `options`.
        folder: where checkpoint and metrics.jsonl go; checked by `check_folder`.
        options: plain values that name the run.
        stop: polled after each iteration; a stop writes a checkpoint first.
        progress: new; filled in.
        every: iterations between checkpoints.

    Yields:
        lines for the user.

    Raises:
        ValueError: the checkpoint can't be read.
        Interrupted: a signal asked the run to stop.
    """
    write_json(folder / OPTIONS, options)
    _load(sampler, folder / CHECKPOINT, progress)
    total, start = sampler.settings.iterations, progress.iterations
    before = progress.seconds - time.process_time()
    keep_lines(folder / METRICS, start)
    if start:
        yield f"resumed at iteration {start} of {total}"
    with (
        (folder / METRICS).open("a", encoding="utf-8") as log,
        tqdm(total=total, initial=start, unit="it", desc=type(sampler).title) as bar,
    ):
        for iteration in range(start, total):
            line: dict[str, float] = {"iteration": iteration, **sampler.iterate(iteration)}
            done, last = iteration + 1, iteration + 1 == total
            if done % every == 0 or last:
                line |= _weights(sampler, iteration)
            line["energy_evaluations"] = sampler.gradients.calls
            log.write(json.dumps(line, allow_nan=False) + "\n")
            log.flush()
            bar.set_postfix({name: f"{line[name]:.3g}" for name in ("loss", "elbo") if name in line})
            bar.update()
            if done % every == 0 or last or stop.number:
                progress.iterations, progress.seconds = done, before + time.process_time()
                _save(sampler, folder / CHECKPOINT, progress)
            stop.poll()


def _weights(sampler: Sampler, iteration: int) -> dict[str, float]:
    drawn = sampler.draw(CHECKED_PATHS, generator_for(sampler.seed, iteration, "weights"))
    return path_weights(drawn.log_weights)._asdict()


def _save(sampler: Sampler, file: Path, progress: Progress) -> None:
    state = {"progress": vars(progress), "sampler": sampler.state_dict()}
    write_whole(file, lambda part: torch.save(state, part))


def _load(sampler: Sampler, file: Path, progress: Progress) -> None:
    """Restore a checkpoint, if there is one."""
    if not file.exists():
        return
    try:
        state = torch.load(file, weights_only=True)
        sampler.load_state_dict(state["sampler"])
        progress.iterations, progress.seconds = state["progress"]["iterations"], state["progress"]["seconds"]
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another --output_dir") from error
