"""The output folder of a run: its lock, its start, the accelerator that writes there."""

import os
import socket
from pathlib import Path
from typing import NamedTuple

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import BaseFileLock, FileLock, Timeout

from am_diffusers.config import Config
from am_diffusers.config.command_line import to_yaml
from am_diffusers.run import leftovers
from am_diffusers.run.plan import Plan
from am_diffusers.run.resume import resume_point
from am_diffusers.system.files import keep_lines, write_text
from am_diffusers.system.joining import join
from am_diffusers.system.processes import Processes
from am_diffusers.training.checkpoint import load_progress
from am_diffusers.training.checkpoint_folder import Checkpoints
from am_diffusers.training.state import Progress
from am_diffusers.training.trackers import PROJECT, Trackers, start_trackers

LOCK_FILE = ".lock"


def lock_folder(folder: Path) -> FileLock:
    """Take the lock of an output folder; the system releases it when the process ends, however it ends.

    Raises:
        FolderError: another run has it; names its process.
    """
    lock = FileLock(folder / LOCK_FILE)
    owner = folder / (LOCK_FILE + ".owner")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = owner.read_text("utf-8").strip() if owner.exists() else "unknown"
        raise leftovers.FolderError(
            f"{folder} is in use by another run ({who}): wait for it, stop it, or choose another --output_dir"
        ) from error
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
    return lock


def make_accelerator(config: Config) -> Accelerator:
    """Return the processes and the device of a run, with its tracker.

    Raises:
        ValueError: as `join`, or if the processes are launched in a way that this trainer has no use for.
    """
    log_with = None if config.run.report_to == "none" else config.run.report_to
    folder = Path(config.run.output_dir) / config.run.logging_dir
    accelerator = join(allow_tf32=config.run.allow_tf32, log_with=log_with, project_dir=folder)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "accelerate's FSDP and DeepSpeed wrap what this trainer keeps apart: launch "
            "with --multi_gpu, and spread the frozen weights with --shard_weights true"
        )
    if config.model.shard_weights and accelerator.num_processes == 1:
        raise ValueError("--shard_weights spreads weights over processes: launch several, or leave it out")
    return accelerator


class Opened(NamedTuple):
    """An output folder that a run has taken.

    Attributes:
        lock: lock of the folder, on the main process.
        found: checkpoint to resume from; None = a fresh start.
        trackers: trackers that continue there.
        stale: results of an earlier run that are to go when the training begins, on the main process.
    """

    lock: BaseFileLock | None
    found: Path | None
    trackers: Trackers
    stale: dict[Path, leftovers.State] | None


def claim(config: Config, checkpoints: Checkpoints) -> None:
    """Check that the run may write to its output folder, see `claim_folder`; for the main process."""
    leftovers.claim_folder(
        checkpoints.folder,
        _events(config),
        overwrite=config.run.overwrite_output_dir,
        resumable=bool(checkpoints.list()),
    )


def open_folder(plan: Plan, checkpoints: Checkpoints, processes: Processes) -> Opened:
    """Take the output folder: its lock, the checkpoint to resume from, and trackers that continue there."""
    config, folder = plan.config, checkpoints.folder
    lock = processes.on_main(lambda: lock_folder(folder))
    found = resume_point(plan, checkpoints, processes)
    done = Progress() if found is None else load_progress(found)
    stale = processes.on_main(
        lambda: {} if checkpoints.list() else leftovers.find_stale(folder, _events(config))
    )
    with processes.together(stoppable=False):
        trackers = start_trackers(
            processes.accelerator,
            folder=folder,
            logging_dir=folder / config.run.logging_dir,
            config=yaml.safe_load(to_yaml(config)),
            resume_iteration=done.iteration,
            validated=done.validated == done.iteration,
        )
    return Opened(lock, found, trackers, stale)


def begin(config: Config, stale: dict[Path, leftovers.State], done: Progress) -> None:
    """Write the resolved config and remove results of an earlier run, or from after the checkpoint.

    To be called on the main process when nothing but the training is ahead: a run that can't begin loses
    nothing.
    """
    folder = Path(config.run.output_dir)
    leftovers.mark(folder)
    leftovers.remove_notes(folder)
    leftovers.remove_stale(stale)
    if (folder / "validation.jsonl").exists():
        keep_lines(folder / "validation.jsonl", done.validated + 1)
    write_text(folder / "config.yaml", to_yaml(config))


def _events(config: Config) -> Path:
    return Path(config.run.output_dir) / config.run.logging_dir / PROJECT
