"""Trackers beside the files of a run: tensorboard, wandb or trackio, through accelerate.

A resumed run continues where it was and shows no iteration twice: tensorboard drops what the run that died
had logged from the resumed iteration on; wandb and trackio continue the run whose id `tracker.json` keeps
and, as they can't drop anything, don't get again what they have.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from am_diffusers.system.files import read_lines, write_json

PROJECT = "am_diffusers"
GRID, PANEL = "validation/samples", "validation/panel"
Scalar = bool | int | float | str


def check_tracker(name: str) -> None:
    """Check that a tracker's package is installed; accelerate itself would run without it.

    Raises:
        ValueError: with the command that installs it.
    """
    if name != "none" and name not in {str(tracker) for tracker in get_available_trackers()}:
        raise ValueError(f'--report_to {name} needs a package: pip install "am_diffusers[{name}]"')


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run; on processes other than the main one they do nothing.

    Attributes:
        accelerator: has the trackers.
        first: iterations before this one are not logged: the trackers have them.
    """

    accelerator: Accelerator
    first: int = 0

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        """Log the metrics of an iteration."""
        if iteration >= self.first:
            self.accelerator.log(metrics, iteration)

    def log_images(self, images: Mapping[str, Image.Image], iteration: int) -> None:
        """Log images by name."""
        for tracker in self.accelerator.trackers if iteration >= self.first else []:
            if tracker.name == "tensorboard":
                for name, image in images.items():
                    tracker.tracker.add_image(name, np.asarray(image), iteration, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image] for name, image in images.items()}, step=iteration)
            elif tracker.name == "trackio":
                import trackio  # an extra  # pyright: ignore[reportMissingImports]

                tracker.log({name: trackio.Image(image) for name, image in images.items()}, step=iteration)


def start_trackers(
    accelerator: Accelerator,
    *,
    folder: Path,
    logging_dir: Path,
    config: Mapping[str, object],
    resume_iteration: int,
    validated: bool = True,
) -> Trackers:
    """Start the accelerator's trackers and store the config in them.

    To be called before metrics.jsonl is cut to the iterations that are resumed from: it says what was logged.

    Args:
        accelerator: made with `log_with`, and with `logging_dir` as its `project_dir`.
        folder: output folder; wandb and trackio call the run by its name.
        logging_dir: where trackers keep files of their own.
        config: the resolved config, without secrets.
        resume_iteration: iterations that were done when this run starts; 0 = a new run.
        validated: whether the model of that iteration was validated; otherwise it will be.
    """
    if not accelerator.is_main_process or not accelerator.log_with:
        return Trackers(accelerator)
    name, resumed = str(accelerator.log_with[0]), resume_iteration > 0
    run_id = _run_id(folder / "tracker.json", name, resumed=resumed)
    logging_dir.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(
        PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": resume_iteration},
            "wandb": {"id": run_id, "name": folder.name, "resume": "allow", "dir": str(logging_dir)},
            "trackio": {"name": f"{folder.name}-{run_id}", "resume": "allow"},
        },
    )
    (tracker,) = accelerator.trackers
    if name != "tensorboard":
        tracker.store_init_configuration(flatten(config))
        done = read_lines(folder / "metrics.jsonl") if resumed else []
        return Trackers(accelerator, first=int(done[-1]["iteration"]) + 1 if done else 0)
    # What accelerate would call, `add_hparams`, makes a run of its own for them at every start.
    for summary in hparams(flatten(config), {"loss": 0.0}):
        tracker.tracker.file_writer.add_summary(summary, resume_iteration)
    trackers = Trackers(accelerator)
    if resumed and validated:
        _log_validation_again(trackers, folder, resume_iteration)
    return trackers


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """Return nested mappings and lists as `rewards/0/name`; None becomes "null", as in the config's YAML."""
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}/")
        elif isinstance(value, list) and value:
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, Scalar):
            flat[name] = value
        else:
            flat[name] = "null" if value is None else str(value)
    return flat


def _log_validation_again(trackers: Trackers, folder: Path, iteration: int) -> None:
    """Log the validation of a checkpoint's model again: the purge has dropped that iteration too."""
    for line in read_lines(folder / "validation.jsonl"):
        if line.pop("iteration") == iteration:
            trackers.log(line, iteration)
            with Image.open(folder / f"samples/iteration-{iteration:06d}.png") as grid:
                trackers.log_images({GRID: grid}, iteration)


def _run_id(path: Path, tracker: str, *, resumed: bool) -> str:
    """Return the id that `path` keeps for a tracker; a new one for a new run or another tracker."""
    known: dict[str, str] = json.loads(path.read_text("utf-8")) if resumed and path.exists() else {}
    if tracker not in known:
        known[tracker] = uuid.uuid4().hex[:8]
        write_json(path, known)
    return known[tracker]
