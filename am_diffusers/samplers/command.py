"""From the options of scripts/sample_energy.py to a result folder."""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from am_diffusers.noise import generator_for
from am_diffusers.samplers import SAMPLERS
from am_diffusers.samplers.base import Sampler
from am_diffusers.samplers.energies import find_energy
from am_diffusers.samplers.figure import draw_samples
from am_diffusers.samplers.metrics import ENOUGH_SHARE, floor, measure, path_weights, resampled
from am_diffusers.samplers.report import render, table
from am_diffusers.samplers.training import Progress, check_folder, train
from am_diffusers.system.files import write_json, write_text, write_whole
from am_diffusers.system.signals import StopSignal

# Neither changes what a run learns or draws.
NOT_OF_THE_RUN = ("output_dir", "checkpointing_steps")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all samplers' settings, each once."""
    known: dict[str, list[str]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for name, sampler in SAMPLERS.items():
        for each in dataclasses.fields(sampler.Settings):
            known.setdefault(each.name, []).append(name)
            fields.setdefault(each.name, each)
    for name, readers in known.items():
        parser.add_argument(
            f"--{name}",
            type=fields[name].metadata["range"].read,
            help=_help(fields[name].metadata["help"], name, readers),
        )


def _help(text: str, name: str, readers: list[str]) -> str:
    """Return a flag's sentence with its default and, where not all samplers read it, who does."""
    defaults = {reader: _default(SAMPLERS[reader], name) for reader in readers}
    of = "" if len(readers) == len(SAMPLERS) else f"; read by {', '.join(readers)}"
    if len(set(defaults.values())) > 1:
        return f"{text} (default: {', '.join(f'{v} for {k}' for k, v in defaults.items())}{of})"
    default = defaults[readers[0]]
    return f"{text} (default: {'by the energy' if default is None else default}{of})"


def _default(sampler: type[Sampler], name: str) -> Any:
    return next(each.default for each in dataclasses.fields(sampler.Settings) if each.name == name)


@dataclass(frozen=True)
class Plan:
    """A run that has been checked.

    Attributes:
        sampler: new.
        options: plain values that name the run.
        folder: where results go.
        every: iterations between checkpoints.
    """

    sampler: Sampler
    options: dict[str, Any]
    folder: Path
    every: int

    def run(self, stop: StopSignal) -> Iterator[str]:
        """Train, sample and report; yield lines for the user.

        Raises:
            ValueError: numbers that aren't finite, a disk that is full, another run here; says what to do.
            Interrupted: a signal asked the run to stop; its checkpoint is written.
        """
        progress, lock = Progress(), FileLock(self.folder / ".lock")  # freed however the process ends
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with lock.acquire(timeout=0):
                yield from train(self.sampler, self.folder, self.options, stop, progress, every=self.every)
                yield from self._results(progress.seconds)
        except Timeout as error:
            raise ValueError(
                f"--output_dir {self.folder} is in use by another run: wait for it, or choose another folder"
            ) from error

    def _results(self, seconds: float) -> Iterator[str]:
        sampler, number, seed = self.sampler, self.options["num_samples"], self.options["seed"]
        energy, folder = sampler.energy, self.folder
        drawn = sampler.draw(number, generator_for(seed, "samples"))
        tensors = {"samples": drawn.x.contiguous(), "log_weights": drawn.log_weights.contiguous()}
        write_whole(folder / "samples.safetensors", lambda part: save_file(tensors, part))
        weights, generator = path_weights(drawn.log_weights), generator_for(seed, "exact")
        numbers: dict[str, Any] = {
            "samples": measure(energy, drawn.x, generator),
            "resampled": {},
            "floor": floor(energy, number, generator),
            "weights": weights._asdict(),
            "energy_evaluations": sampler.gradients.calls,
            "cpu_seconds": seconds,
            "log_z_exact": energy.log_z,
        }
        if weights.effective_share > ENOUGH_SHARE:
            numbers["resampled"] = measure(energy, resampled(drawn, number, generator), generator)
        title = f"{self.options['energy']}, {type(sampler).title}"
        draw_samples(folder / "samples.png", energy, drawn.x, energy.sample(number, generator), title)
        write_json(folder / "report.json", {"options": self.options, **numbers})
        write_text(folder / "report.md", render(sampler, self.options, numbers))
        yield "\n".join(table(numbers))
        yield f"samples, report.md and samples.png: {folder.resolve()}"


def plan_of(options: argparse.Namespace) -> Plan:
    """Check options before any work.

    Raises:
        ValueError: one of them is wrong, or not read by the sampler, or the folder has another run.
    """
    given = vars(options)
    kind = SAMPLERS[options.sampler]
    own = {each.name for each in dataclasses.fields(kind.Settings)}
    every = {each.name for sampler in SAMPLERS.values() for each in dataclasses.fields(sampler.Settings)}
    for name in sorted(every - own):
        if given[name] is not None:
            raise ValueError(f"--{name} is not read by --sampler {options.sampler}: leave it out")
    energy = find_energy(options.energy, options.dimension)
    chosen = {name: given[name] for name in own if given[name] is not None}
    settings = kind.Settings(**chosen).resolved(energy)
    plain = {
        name: str(v) if isinstance(v, Path) else v for name, v in given.items() if name not in NOT_OF_THE_RUN
    }
    check_folder(options.output_dir, plain)
    torch.set_num_threads(1)  # tensors this small are slower on several
    return Plan(kind(energy, settings, options.seed), plain, options.output_dir, options.checkpointing_steps)
