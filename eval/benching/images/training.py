"""Runs of `finetune.py`'s trainer against the clock: LoRAs kept at marks, nothing else in between."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from am_diffusers.config.command_line import parse_config
from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.run.build import build
from am_diffusers.run.counting import count
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from benching.images.study import Flag, Mark, command_line

# More than any budget here allows; the schedule is constant, so the number changes nothing.
NO_END = 1_000_000


class Reached(NamedTuple):
    """Progress of a run at a mark: CPU seconds of iterations, transformer calls, optimizer steps."""

    mark: Mark
    seconds: float
    calls: float
    iterations: int

    def lora(self, folder: Path) -> Path:
        """Return the LoRA's file in the run's folder."""
        return folder / self.mark.name / LORA_FILE


def train(flags: Mapping[str, Flag], seed: int, marks: Sequence[Mark], folder: Path) -> list[Reached]:
    """Train until all marks are passed; the LoRA of each goes into a folder of its name.

    An iteration counts by the processor's time, which other work on the machine hardly changes. A run
    that was killed starts again: its clock can't be resumed.

    Args:
        flags: flags of finetune.py, without output_dir and seed.
        seed: seed of the run.
        marks: marks at which LoRAs are kept.
        folder: folder of the run; its content is replaced.

    Raises:
        ValueError: from the config, or from an iteration.
    """
    own = {"output_dir": str(folder), "seed": seed, "max_train_steps": NO_END, "report_to": "none"}
    own["overwrite_output_dir"] = True
    own["certificate_images"] = 0  # nothing is validated
    config = parse_config(command_line({**flags, **own}))
    accelerator = make_accelerator(config)
    run = build(make_plan(config, accelerator.num_processes), accelerator)
    calls_per_iteration = sum(count(config).calls.values()) * config.optimizer.train_batch_size
    trainer, reached, seconds = run.trainer, list[Reached](), 0.0
    try:
        while len(reached) < len(marks):
            iteration, started = trainer.state.iteration, time.process_time()
            metrics = trainer.iterate()
            seconds += time.process_time() - started
            trainer.state.progress.iteration += 1
            trainer.log.write(iteration, metrics)
            calls = calls_per_iteration * trainer.state.iteration
            for mark in marks:
                done = Reached(mark, seconds, calls, trainer.state.iteration)
                if mark.passed(*done[1:]) and mark not in [each.mark for each in reached]:
                    run.save_lora(done.lora(folder).parent)
                    reached.append(done)
    finally:
        trainer.log.close()
        if run.lock is not None:
            run.lock.release()
    return sorted(reached, key=lambda done: done.seconds)


def machine() -> dict[str, str]:
    """Return the machine that the seconds are measured on."""
    name = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown CPU"
    )
    return {"device": name, "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
