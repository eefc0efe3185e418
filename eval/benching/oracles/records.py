"""Results, one per file: what a row of the comparison gives on a problem with a seed, and its settings.

A result is skipped if a file with the same settings exists, and computed anew if they differ.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from am_diffusers.system.failures import NonFiniteError
from am_diffusers.system.files import write_whole
from am_diffusers.velocity import CallableField
from benching.oracles import laws as oracle_laws
from benching.oracles import training as oracle_training
from benching.oracles.laws import Sampler, law_of, points_of
from benching.oracles.measures import Points, measures
from benching.oracles.problems import PROBLEMS
from benching.oracles.training import control, reaches, train
from benching.oracles.variants import VARIANTS

DATA = Path(__file__).parents[1] / "data" / "oracles"
AIM_SEED, FAR = 1_000_000, 10.0
"""Seed of the aim's points in the plane; radius beyond which a law has diverged (data are within 3)."""
DRAWN = ("two_modes_quadratic", 0)
"""Problem and seed whose densities are kept, for the figure."""
BIN_EDGES = torch.linspace(-3, 3, 121, dtype=torch.float64)
"""Edges of the bins of those densities."""
Record = dict[str, Any]
Reference = Literal["base", "base_as_base", "tilt_velocity", "two_sets"]
REFERENCES: dict[Reference, str] = {
    "base": "untuned base",
    "tilt_velocity": "the tilt's own velocity: what the samplers leave",
    "base_as_base": "untuned base against the base's law: the same",
    "two_sets": "two sets of samples of the tilt: the floor",
}


class Key(NamedTuple):
    """Name of a result: problem, row and seed."""

    problem: str
    row: str
    seed: int

    def file(self, folder: Path) -> Path:
        """Return the file of the result."""
        return folder / self.problem / f"{self.row}-seed{self.seed}.json"


def settings_of(key: Key) -> Record:
    """Return everything that a result depends on, as JSON gives it back."""
    problem = PROBLEMS[key.problem]
    found: Record = {"problem": problem.describe(), "seed": key.seed, "laws": oracle_laws.describe()}
    if key.row in VARIANTS:
        variant = VARIANTS[key.row]
        declared = dataclasses.asdict(variant)
        del declared["title"]
        found |= {
            "row": declared,
            "method": variant.resolved(),
            "training": oracle_training.describe(),
        }
    else:
        found |= {"reference": key.row}
    return json.loads(json.dumps(found))


def load(key: Key, folder: Path = DATA) -> Record | None:
    """Load a result that was written, or return None."""
    file = key.file(folder)
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def ensure(key: Key, folder: Path = DATA) -> Literal["kept", "new", "settings changed"]:
    """Compute and write a result unless it is there with the same settings; return what was done.

    Raises:
        ValueError: if the file can't be written.
    """
    before, settings = load(key, folder), settings_of(key)
    if before is not None and before["settings"] == settings:
        return "kept"
    start = time.process_time()
    result = _of_variant(key) if key.row in VARIANTS else _of_reference(key)
    document = {"settings": settings, "cpu_seconds": round(time.process_time() - start, 1), **result}
    text = json.dumps(document, indent=1) + "\n"
    write_whole(key.file(folder), lambda part: part.write_text(text, "utf-8"))
    return "new" if before is None else "settings changed"


def _of_variant(key: Key) -> Record:
    """Train a row's method, and measure what its field samples."""
    problem, variant = PROBLEMS[key.problem], VARIANTS[key.row]
    start = problem.tilt() if variant.schedule.from_tilt else problem.law
    field, parameters = control(start, key.seed)
    method = variant.make(field, problem)
    try:
        made = train(method, parameters, variant.schedule, seed=key.seed, done=reaches(field, problem))
    except NonFiniteError:
        return {"iterations": None, "found": dict.fromkeys(variant.samplers), "densities": {}}
    return {"iterations": made, **_judge(field, key, variant.samplers)}


def _of_reference(key: Key) -> Record:
    problem = PROBLEMS[key.problem]
    if key.row == "two_sets":
        return {"found": {"ode": _measured(points_of(problem.tilt(), key.seed), key)}, "densities": {}}
    tilted = key.row == "tilt_velocity"
    return _judge((problem.tilt() if tilted else problem.law).field(), key, ["sde", "ode"])


@torch.no_grad()
def _judge(field: CallableField, key: Key, samplers: list[Sampler]) -> Record:
    """Measure the laws that a field samples, None where they have diverged, and their densities."""
    found: Record = {}
    densities: Record = {}
    for sampler in samplers:
        try:
            law = law_of(field, PROBLEMS[key.problem].dim, sampler, key.seed)
        except ValueError:  # points that aren't finite
            found[sampler] = None
            continue
        found[sampler] = None if law.x.abs().max().item() > FAR else _measured(law, key)
        if (key.problem, key.seed) == DRAWN and found[sampler] is not None:
            densities[sampler] = density(law)
    return {"found": found, "densities": densities}


def _measured(law: Points, key: Key) -> Record:
    """Measure a law against the one it should be, in 5 digits."""
    problem = PROBLEMS[key.problem]
    aim = problem.law if key.row == "base_as_base" else problem.tilt()
    values = measures(law, aim, points_of(aim, AIM_SEED), problem)
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def density(law: Points) -> list[float]:
    """Return the mean density of a law on a line between `BIN_EDGES`, in 4 digits."""
    x, order = law.x[:, 0].sort()
    weight = law.weight[order]
    levels = weight.cumsum(0) - weight / 2  # of the points; linear between them, so that no grid shows
    shares = torch.from_numpy(np.interp(BIN_EDGES, x, levels, 0.0, 1.0)).diff()
    return [float(f"{value:.4g}") for value in (shares / BIN_EDGES.diff()).tolist()]
