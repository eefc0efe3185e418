"""Config to objects. This package, plan.py (checks) and load.py (weights) are the only ones that see both."""

import os
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from am_diffusers.build.sharing import hub_target, make_sharing
from am_diffusers.build.showing import make_grids, make_held_out, make_verifier
from am_diffusers.build.training import TRACKER_PROJECT, make_trainer
from am_diffusers.command_line import to_yaml
from am_diffusers.config import Config
from am_diffusers.load import load_model, load_rewards
from am_diffusers.plan import Plan
from am_diffusers.run import Run


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


def build(plan: Plan, accelerator: Accelerator) -> Run:
    """Load the models and put a run together; writes the resolved config beside its outputs.

    Raises:
        ValueError: a model or reward cannot be loaded; the message says what to do.
    """
    config, folder = plan.config, Path(plan.config.run.output_dir)
    # Before anything of an earlier run is removed: it fails without a token or a network.
    target = hub_target(config) if accelerator.is_main_process else None
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    if accelerator.is_main_process:
        start_folder(config, folder)
    # The model first: once its text encoders are freed there is room for the rewards.
    model = load_model(plan, accelerator.device)
    trained, held_out = load_rewards(plan, accelerator.device)
    return Run(
        trainer=make_trainer(plan, model, trained, accelerator),
        save_lora=partial(model.save_lora, folder),
        verify_lora=make_verifier(plan, model),
        held_out=make_held_out(plan, model, trained, held_out) if plan.eval_prompts else None,
        share=make_sharing(plan, accelerator, target),
        accelerator=accelerator,
        folder=folder,
    )


def start_folder(config: Config, folder: Path) -> None:
    """Write the resolved config and remove an earlier run's results; its LoRA stays until it is replaced."""
    logs = folder / config.run.logging_dir / TRACKER_PROJECT
    results = [
        folder / "evaluation.json",
        folder / "error.txt",
        folder / "README.md",
        *(folder / "samples").glob("iteration-*.png"),
    ]
    for path in [*results, *logs.glob("events.out.tfevents*")]:
        path.unlink(missing_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), "utf-8")
