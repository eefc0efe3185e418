"""Config to objects. This package, plan.py (checks), load.py (weights) and estimate/ alone see both."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import BaseFileLock
from torch.distributed.device_mesh import init_device_mesh

from am_diffusers.build.auto import find_micro_batches
from am_diffusers.build.methods import METHOD_BUILDERS
from am_diffusers.build.resume import make_checkpoints, outdated, resume_point, settings_of
from am_diffusers.build.sharing import find_target, make_sharing
from am_diffusers.build.showing import make_held_out, make_scorer, make_validation, make_verifier
from am_diffusers.build.training import make_log, make_state, make_trainer, raw_rewards
from am_diffusers.config import Config
from am_diffusers.config.belonging import cautions
from am_diffusers.config.command_line import to_yaml
from am_diffusers.evaluation.base_rewards import BASE_REWARDS_FILE
from am_diffusers.folder_lock import lock_folder
from am_diffusers.load import encoder, load_model, load_rewards, weighted
from am_diffusers.models.lora import LORA_FILE
from am_diffusers.models.sd3 import SD3
from am_diffusers.models.sharding import shard_frozen
from am_diffusers.plan import Plan
from am_diffusers.run import Run
from am_diffusers.system.processes import Processes, StopSignal, check_joined
from am_diffusers.training.checkpoint import Saver, load_progress
from am_diffusers.training.checkpoint_folder import Checkpoints
from am_diffusers.training.metrics import keep_lines
from am_diffusers.training.state import Progress, TrainState
from am_diffusers.training.trackers import PROJECT, Trackers, start_trackers
from am_diffusers.training.trainer import Hooks

logger = logging.getLogger(__name__)

EMA_FOLDER = "ema"
STOPPED_FILE = "stopped"


def make_accelerator(config: Config) -> Accelerator:
    """Processes and device of a run, and its tracker.

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


def build(plan: Plan, accelerator: Accelerator, stop: StopSignal | None = None) -> Run:
    """Load the models and put a run together, as its last checkpoint left it.

    Args:
        plan: what to do.
        accelerator: processes and device.
        stop: polled by all work of the run.

    Raises:
        CheckpointError: the checkpoint can't be gone on from; no model is loaded then.
        ValueError: a model or reward cannot be loaded, another run has the folder, or the result couldn't
            be uploaded; says what to do.
    """
    config = plan.config
    processes = Processes(accelerator, stop, lockstep=config.model.shard_weights)
    processes.on_main(lambda: warn(config))
    target = find_target(config, processes)
    folder, checkpoints = Path(config.run.output_dir), make_checkpoints(config)
    lock, found, trackers = open_folder(plan, checkpoints, processes)
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    # The model first: once its text encoders are freed there is room for the rewards.
    model = load_model(plan, accelerator.device)
    model.before_pass = processes.poll
    if config.model.shard_weights:
        shard_frozen(model.transformer, init_device_mesh(accelerator.device.type, (processes.number,)))
    trained, held_out = load_rewards(plan, accelerator.device)
    plan = find_micro_batches(plan, model, trained, processes)
    reward = weighted(trained, config)
    method = METHOD_BUILDERS[config.method.method](plan, model, reward, processes)
    reward.drain()  # scores of the base pictures a divergence was normalised on belong to no iteration
    state = make_state(config.optimizer, model.lora_parameters())
    save_lora = lora_writer(model, state)
    saver = Saver(
        checkpoints, processes, state, method, settings_of(plan), save_lora, config.checkpoint.on_full_disk
    )
    if found is not None:
        saver.restore(found, outdated=outdated(found, saver.settings))
    scorer, roles = make_scorer(plan, model, trained, held_out)
    hooks = Hooks(
        encode=encoder(config, model, config.method.rollout_guidance_scale),
        validate=make_validation(plan, scorer, roles, processes, trackers),
        save=saver.save,
        more=partial(raw_rewards, reward, processes),
        forget=reward.drain,
    )
    log = make_log(config, trackers, start=state.iteration)
    return Run(
        trainer=make_trainer(plan, method, state, hooks=hooks, processes=processes, log=log),
        save_lora=save_lora,
        verify_lora=make_verifier(plan, model),
        held_out=make_held_out(plan, scorer, roles) if plan.eval_prompts else None,
        share=make_sharing(plan, processes, target),
        processes=processes,
        folder=folder,
        lock=lock,
    )


def warn(config: Config) -> None:
    """Log what a user should know of the settings."""
    for text in cautions(config):
        logger.warning("%s", text)


def open_folder(
    plan: Plan, checkpoints: Checkpoints, processes: Processes
) -> tuple[BaseFileLock | None, Path | None, Trackers]:
    """Take the output folder: its lock, the checkpoint to go on from, and trackers that go on there too."""
    config, folder = plan.config, Path(plan.config.run.output_dir)
    locks: list[BaseFileLock] = []
    processes.on_main(lambda: locks.append(lock_folder(folder)))
    found = resume_point(plan, checkpoints, processes)
    done = Progress() if found is None else load_progress(found)
    processes.on_main(lambda: start_folder(config, folder, done))
    trackers = start_trackers(
        processes.accelerator,
        folder=folder,
        logging_dir=folder / config.run.logging_dir,
        config=yaml.safe_load(to_yaml(config)),
        resume_iteration=done.iteration,
        validated=done.validated == done.iteration,
    )
    lock = locks[0] if locks else None
    return lock, found, trackers


def lora_writer(model: SD3, state: TrainState) -> Callable[[Path], list[Path]]:
    """Writes the LoRA into a folder, and its running mean into `ema` there; returns the files."""

    def write(folder: Path) -> list[Path]:
        files = [model.save_lora(folder)]
        if state.ema is not None:
            with state.ema_weights():
                files.append(model.save_lora(folder / EMA_FOLDER))
        return files

    return write


def start_folder(config: Config, folder: Path, done: Progress) -> None:
    """Write the resolved config; remove results of an earlier run, or from after its checkpoint."""
    logs = folder / config.run.logging_dir / PROJECT
    results = [folder / name for name in ("evaluation.json", "error.txt", STOPPED_FILE, "README.md")]
    if not config.optimizer.use_ema:
        results.append(folder / EMA_FOLDER / LORA_FILE)
    if done.iteration == 0:
        results += [folder / BASE_REWARDS_FILE, folder / "validation.jsonl", folder / "samples/panel.png"]
        results += [*(folder / "samples").glob("iteration-*.png"), *logs.glob("events.out.tfevents*")]
    for path in results:
        path.unlink(missing_ok=True)
    if done.iteration > 0:
        keep_lines(folder / "validation.jsonl", done.validated + 1)
    (folder / "config.yaml").write_text(to_yaml(config), "utf-8")
