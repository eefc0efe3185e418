"""Results of a run of a benchmark, as a committed JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from am_diffusers.evaluation.statistics import Estimate
from am_diffusers.system.files import write_text

DIGITS = 5


@dataclass(frozen=True)
class Reward:
    """Scores of one reward on the images of a LoRA against the base's of the same noise.

    Attributes:
        role: `trained` or `held-out`.
        gain: mean paired difference in base standard deviations, with its 95 % interval over prompts.
        by_prompt: gain of each prompt, (P,), so that runs can be compared prompt by prompt.
    """

    role: str
    gain: Estimate
    by_prompt: list[float]


@dataclass(frozen=True)
class Judged:
    """Answers of the embedded world's judge by prompt, (P,) each.

    Attributes:
        clean: share of the images that are clean.
        right: share of the images that are clean and show what the prompt says.
    """

    clean: list[float]
    right: list[float]


@dataclass(frozen=True)
class Chain:
    """Images of a LoRA by the chain of the certificate, means of each of its prompts.

    Attributes:
        gain: trained reward less that of the base's images of the same noise, in the reward's units.
        path_kl: KL divergence of the chain from the base's, in nats.
    """

    gain: list[float]
    path_kl: list[float]


@dataclass(frozen=True)
class Snapshot:
    """Results of a LoRA at a mark.

    Attributes:
        mark: name of the mark.
        seconds: CPU seconds of training until then.
        calls: transformer calls until then, counted per sample.
        iterations: optimizer steps until then.
        rewards: rewards by name.
        diversity_kept: mean pairwise distance of a prompt's images, tuned / base.
        frechet: squared Frechet distance to the base's images of other noise less that of the base itself:
            0 on average for an unchanged model.
        judged: answers of the judge.
        judged_base: answers of the judge on the base's images of the same noise.
        chain: images by the chain of the certificate.
    """

    mark: str
    seconds: float
    calls: float
    iterations: int
    rewards: dict[str, Reward]
    diversity_kept: Estimate
    frechet: float
    judged: Judged
    judged_base: Judged
    chain: Chain

    def gain(self, role: str) -> float:
        """Return the mean gain of the rewards of a role, in base standard deviations."""
        gains = [reward.gain.value for reward in self.rewards.values() if reward.role == role]
        return sum(gains) / len(gains)


@dataclass(frozen=True)
class Record:
    """Results of a run.

    Attributes:
        setting: name of the setting.
        method: method of the setting.
        seed: seed of training.
        declared: settings it depends on: flags, marks, evaluation, as plain JSON values.
        machine: machine that the seconds were measured on.
        snapshots: snapshots in order of time.
        failed: reason why the run ended before its marks, without snapshots; "" = it didn't.
    """

    setting: str
    method: str
    seed: int
    declared: dict[str, object]
    machine: dict[str, str]
    snapshots: list[Snapshot]
    failed: str = ""

    def at(self, mark: str) -> Snapshot:
        """Return the snapshot of a mark."""
        return next(snapshot for snapshot in self.snapshots if snapshot.mark == mark)


_READER = TypeAdapter(Record)


def record_file(folder: Path, setting: str, seed: int) -> Path:
    """Return the file of the record of a run."""
    return folder / f"{setting}-seed{seed}.json"


def write_record(record: Record, file: Path) -> None:
    """Write a record, whole or not at all, with numbers of five significant digits."""
    document = rounded(asdict(record))
    write_text(file, json.dumps(document, indent=None, allow_nan=False).replace("}, {", "},\n{") + "\n")


def read_record(file: Path, declared: Mapping[str, object] | None = None) -> Record:
    """Read a record.

    Args:
        file: file written by `write_record`.
        declared: settings it must depend on; None = any.

    Raises:
        ValueError: if it can't be read, or belongs to something else.
    """
    try:
        record = _READER.validate_python(json.loads(file.read_text("utf-8")))
    except (OSError, ValidationError, ValueError) as error:
        raise ValueError(f"{file} can't be read as a record: remove it and run again ({error})") from error
    if file != record_file(file.parent, record.setting, record.seed):
        raise ValueError(f"{file} is the record of {record.setting}, seed {record.seed}: remove or rename it")
    if declared is not None:
        differ = [name for name, value in declared.items() if record.declared.get(name) != rounded(value)]
        if differ:
            raise ValueError(
                f"{file} was made with other {', '.join(differ)} than are declared now: remove it to run it "
                "again, or undo the change"
            )
    return record


def rounded(value: object) -> object:
    """Convert a value to plain JSON values with short numbers."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(each) for each in value]
    return value
