"""Config to objects. This package, plan.py (checks) and load.py (weights) are the only ones that see both."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from am_diffusers.base_rewards import BASE_REWARDS_FILE
from am_diffusers.build.auto import find_micro_batches
from am_diffusers.build.method import METHOD_BUILDERS
from am_diffusers.build.resume import make_checkpoints, resume_point, settings_of
from am_diffusers.build.showing import make_grids, make_held_out, make_verifier
from am_diffusers.build.training import TRACKER_PROJECT, make_state, make_trainer
from am_diffusers.command_line import to_yaml
from am_diffusers.config import Config
from am_diffusers.load import load_model, load_rewards, weighted
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import Plan
from am_diffusers.processes import Processes, StopSignal
from am_diffusers.run import Run
from am_diffusers.saver import Saver, lock_folder
from am_diffusers.train_state import TrainState

EMA_FOLDER = "ema"


def make_accelerator(config: Config) -> Accelerator:
    """Processes and device of a run, and its tracker.

    Raises:
        ValueError: if several processes were launched that don't know of each other: each would be a run
            of its own, in the same folder.
    """
    log_with = None if config.run.report_to == "none" else config.run.report_to
    folder = Path(config.run.output_dir) / config.run.logging_dir
    accelerator = Accelerator(log_with=log_with, project_dir=folder)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}: "
            "on a CPU set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def build(plan: Plan, accelerator: Accelerator, stop: StopSignal | None = None) -> Run:
    """Load the models and put a run together, as its last checkpoint left it.

    Args:
        plan: what to do.
        accelerator: processes and device.
        stop: polled by all work of the run.

    Raises:
        CheckpointError: the checkpoint can't be gone on from; no model is loaded then.
        ValueError: a model or reward cannot be loaded, or another run has the folder; says what to do.
    """
    config, folder = plan.config, Path(plan.config.run.output_dir)
    processes = Processes(accelerator, stop)
    lock = lock_folder(folder) if processes.is_main else None
    checkpoints = make_checkpoints(config)
    found = resume_point(plan, checkpoints, processes)
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    if processes.is_main:
        start_folder(config, folder, fresh=found is None)
    # The model first: once its text encoders are freed there is room for the rewards.
    model = load_model(plan, accelerator.device)
    model.before_pass = processes.poll
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
        saver.restore(found)
    grids = make_grids(plan, model) if processes.is_main else None
    return Run(
        trainer=make_trainer(
            plan,
            model,
            reward,
            method,
            state,
            processes=processes,
            validate=grids or (lambda iteration: None),
            save=saver.save,
        ),
        save_lora=save_lora,
        verify_lora=make_verifier(plan, model),
        held_out=make_held_out(plan, model, trained, held_out) if plan.eval_prompts else None,
        processes=processes,
        folder=folder,
        lock=lock,
    )


def lora_writer(model: SD3, state: TrainState) -> Callable[[Path], list[Path]]:
    """Writes the LoRA into a folder, and its running mean into `ema` there; returns the files."""

    def write(folder: Path) -> list[Path]:
        files = [model.save_lora(folder)]
        if state.ema is not None:
            with state.ema_weights():
                files.append(model.save_lora(folder / EMA_FOLDER))
        return files

    return write


def start_folder(config: Config, folder: Path, *, fresh: bool) -> None:
    """Write the resolved config; an earlier run's results go if this one starts afresh."""
    logs = folder / config.run.logging_dir / TRACKER_PROJECT
    results = [folder / "evaluation.json", folder / "error.txt"]
    if fresh:
        results += [folder / BASE_REWARDS_FILE]
        results += [*(folder / "samples").glob("iteration-*.png"), *logs.glob("events.out.tfevents*")]
    for path in results:
        path.unlink(missing_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), "utf-8")
