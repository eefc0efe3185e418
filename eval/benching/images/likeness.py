"""Likeness to real images, beside the records: what `judging.py` found.

eval/benching/data/STUDY/likeness/SETTING-seed0.json
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from am_diffusers.evaluation.statistics import Estimate
from am_diffusers.system.files import write_text
from benching.images.records import Record, Reward, rounded

LIKENESS, ROLE = "likeness", "independent"
FOLDER = "likeness"


@dataclass(frozen=True)
class Judged:
    """Comparison of images with real ones.

    Attributes:
        gain: gain of the likeness over the base's images, in base standard deviations.
        by_prompt: gain of each prompt, (P,).
        frechet: squared Frechet distance to the real images, in squared units of the features.
    """

    gain: Estimate
    by_prompt: list[float]
    frechet: float


@dataclass(frozen=True)
class RunLikeness:
    """Likeness of the images of a run, beside its record.

    Attributes:
        judge: fingerprints of the features, of the real images and of the base's.
        base: judgement of the base's images.
        real: judgement of other real images.
        marks: judgement of the run's images at each mark.
    """

    judge: dict[str, str]
    base: Judged
    real: Judged
    marks: dict[str, Judged]


_READER = TypeAdapter(RunLikeness)


def likeness_file(record: Path) -> Path:
    """Return the file of the likeness of a record's run."""
    return record.parent / FOLDER / record.name


def write_likeness(found: RunLikeness, file: Path) -> None:
    """Write a run's likeness, whole or not at all."""
    write_text(file, json.dumps(rounded(asdict(found)), allow_nan=False).replace("}, ", "},\n") + "\n")


def read_likeness(file: Path) -> RunLikeness | None:
    """Read a run's likeness; None if there is none.

    Raises:
        ValueError: it can't be read.
    """
    if not file.exists():
        return None
    try:
        return _READER.validate_python(json.loads(file.read_text("utf-8")))
    except (OSError, ValidationError, ValueError) as error:
        raise ValueError(f"{file} can't be read: remove it and judge again ({error})") from error


def with_likeness(record: Record, found: RunLikeness) -> Record:
    """Return the record with the likeness among the gains of its snapshots."""
    added = {mark: {LIKENESS: Reward(ROLE, each.gain, each.by_prompt)} for mark, each in found.marks.items()}
    snapshots = [replace(each, rewards=each.rewards | added[each.mark]) for each in record.snapshots]
    return replace(record, snapshots=snapshots)
