"""The benchmark of samplers of energies: laws, settings, records, table."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from am_diffusers.samplers import SAMPLERS
from am_diffusers.system.files import write_json

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data" / "samplers"
SEEDS = (0, 1, 2)


class Law(NamedTuple):
    """A law: its flags, and its title in the table."""

    flags: tuple[str, ...]
    title: str


LAWS = {
    "many_well_5": Law(("--energy", "many_well", "--dimension", "5"), "MW-5"),
    "gmm40_2": Law(("--energy", "gmm40", "--dimension", "2"), "GMM40, 2 dimensions"),
    "funnel_10": Law(("--energy", "funnel", "--dimension", "10"), "Funnel-10"),
    "gmm40_50": Law(("--energy", "gmm40", "--dimension", "50"), "GMM40, 50 dimensions"),
    "student_mixture_50": Law(("--energy", "student_mixture", "--dimension", "50"), "MoS, 50 dimensions"),
}

SETTINGS = {
    "adjoint_sampling": ("--iterations", "3000", "--checkpointing_steps", "100"),
    "asbs": ("--iterations", "3000", "--checkpointing_steps", "100"),
    "naas": ("--iterations", "1000", "--checkpointing_steps", "50"),
}
"""The same for all laws, chosen for ten minutes of one core; the rest are the defaults."""


class Key(NamedTuple):
    """One run."""

    law: str
    sampler: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its record and folder."""
        return f"{self.law}-{self.sampler}-{self.seed}"


def command(key: Key, folder: Path) -> list[str]:
    """Return the command line of a run."""
    flags = [*LAWS[key.law].flags, "--sampler", key.sampler, "--seed", str(key.seed)]
    flags += ["--output_dir", str(folder), *SETTINGS[key.sampler]]
    return [sys.executable, str(ROOT / "scripts" / "sample_energy.py"), *flags]


def ensure(key: Key, data: Path, work: Path) -> str:
    """Run what has no record; return what was done, in words.

    Raises:
        ValueError: the run failed; has its last line.
    """
    record, folder = data / f"{key.name}.json", work / key.name
    if record.exists():
        return "kept"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(key, folder), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise ValueError(f"{key.name}: {done.stdout.strip().splitlines()[-1]}")
    found = json.loads((folder / "report.json").read_text("utf-8"))
    write_json(record, found)
    return f"{found['cpu_seconds']:.0f} CPU seconds"


def load(key: Key, data: Path) -> dict[str, Any] | None:
    """Return a record, None if there is none."""
    file = data / f"{key.name}.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def render(data: Path) -> str:
    """Return the table of what has records: ranges over the seeds."""
    lines = [
        "| law | sampler | transport cost | resampled | floor | mass error (exact samples) | error of log Z "
        "| share | energies | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for law, sampler in ((law, sampler) for law in LAWS for sampler in SAMPLERS):
        records = [found for seed in SEEDS if (found := load(Key(law, sampler, seed), data)) is not None]
        if records:
            cells = [LAWS[law].title, f"`{sampler}`", *_cells(records)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(records: list[dict[str, Any]]) -> list[str]:
    def span(*path: str) -> str:
        values = [value for record in records if (value := _at(record, path)) is not None]
        if not values:
            return ""
        low, high = (f"{value:.3g}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    for record in records:
        record["log_z_error"] = record["weights"]["log_z"] - record["log_z_exact"]
    exact = span("floor", "mass_error")
    mass = span("samples", "mass_error") + (f" ({exact})" if exact else "")
    return [
        span("samples", "transport"),
        span("resampled", "transport"),
        span("floor", "transport"),
        mass,
        span("log_z_error"),
        span("weights", "effective_share"),
        span("energy_evaluations"),
        span("cpu_seconds"),
    ]


def _at(record: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
