"""The output folder of a run: its lock, its start, the accelerator that writes there."""

import os
import socket
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import BaseFileLock, FileLock, Timeout

from am_diffusers.config import Config
from am_diffusers.config.command_line import to_yaml
from am_diffusers.models.lora import LORA_FILE
from am_diffusers.run.base_scores import CERTIFICATE, DIVERGENCE, FRONTIER
from am_diffusers.run.plan import Plan
from am_diffusers.run.resume import resume_point
from am_diffusers.system.files import keep_lines, write_text
from am_diffusers.system.processes import Processes, check_joined
from am_diffusers.training.checkpoint import load_progress
from am_diffusers.training.checkpoint_folder import Checkpoints
from am_diffusers.training.state import Progress
from am_diffusers.training.trackers import PROJECT, Trackers, start_trackers

LOCK_FILE = ".lock"


class FolderInUseError(ValueError):
    """Error: another run writes to the folder."""


def lock_folder(folder: Path) -> FileLock:
    """Take the lock of an output folder; the system releases it when the process ends, however it ends.

    Raises:
        FolderInUseError: another run has it; names its process.
    """
    lock = FileLock(folder / LOCK_FILE)
    owner = folder / (LOCK_FILE + ".owner")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = owner.read_text("utf-8").strip() if owner.exists() else "unknown"
        raise FolderInUseError(
            f"{folder} is in use by another run ({who}): wait for it, stop it, or choose another --output_dir"
        ) from error
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
    return lock


EMA_FOLDER = "ema"
STOPPED_FILE = "stopped"


def make_accelerator(config: Config) -> Accelerator:
    """Return the processes and the device of a run, with its tracker.

    Raises:
        ValueError: if several processes were launched that don't know of each other: each would be a run
            of its own, in the same folder.
    """
    log_with = None if config.run.report_to == "none" else config.run.report_to
    folder = Path(config.run.output_dir) / config.run.logging_dir
    accelerator = Accelerator(log_with=log_with, project_dir=folder)
    check_joined(accelerator)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "accelerate's FSDP and DeepSpeed wrap what this trainer keeps apart: launch "
            "with --multi_gpu, and spread the frozen weights with --shard_weights true"
        )
    if config.model.shard_weights and accelerator.num_processes == 1:
        raise ValueError("--shard_weights spreads weights over processes: launch several, or leave it out")
    return accelerator


def open_folder(
    plan: Plan, checkpoints: Checkpoints, processes: Processes
) -> tuple[BaseFileLock | None, Path | None, Trackers]:
    """Take the output folder: its lock, the checkpoint to resume from, and trackers that continue there."""
    config, folder = plan.config, Path(plan.config.run.output_dir)
    lock = processes.on_main(lambda: lock_folder(folder))
    found = resume_point(plan, checkpoints, processes)
    done = Progress() if found is None else load_progress(found)
    processes.on_main(lambda: start_folder(config, folder, done))
    with processes.together(stoppable=False):
        trackers = start_trackers(
            processes.accelerator,
            folder=folder,
            logging_dir=folder / config.run.logging_dir,
            config=yaml.safe_load(to_yaml(config)),
            resume_iteration=done.iteration,
            validated=done.validated == done.iteration,
        )
    return lock, found, trackers


def start_folder(config: Config, folder: Path, done: Progress) -> None:
    """Write the resolved config; remove results of an earlier run, or from after its checkpoint."""
    logs = folder / config.run.logging_dir / PROJECT
    results = [folder / name for name in ("evaluation.json", "error.txt", STOPPED_FILE, "README.md")]
    if not config.optimizer.use_ema:
        results.append(folder / EMA_FOLDER / LORA_FILE)
    if done.iteration == 0:
        results += [folder / name for name in (DIVERGENCE, FRONTIER, CERTIFICATE, "validation.jsonl")]
        results += [folder / "samples/panel.png"]
        results += [*(folder / "samples").glob("iteration-*.png"), *logs.glob("events.out.tfevents*")]
    for path in results:
        path.unlink(missing_ok=True)
    if done.iteration > 0:
        keep_lines(folder / "validation.jsonl", done.validated + 1)
    write_config(config)


def write_config(config: Config) -> None:
    """Write the resolved config into the output folder."""
    write_text(Path(config.run.output_dir) / "config.yaml", to_yaml(config))
