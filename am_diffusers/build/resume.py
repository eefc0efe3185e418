"""Where a run goes on, and whether what it is told now is what it was told then."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from am_diffusers.checkpoint import CheckpointError, Checkpoints, iteration_of
from am_diffusers.config import CheckpointConfig, Config, EvaluationConfig, RunConfig, TerminalConfig
from am_diffusers.plan import Plan
from am_diffusers.processes import Processes
from am_diffusers.redact import redact, redact_values
from am_diffusers.saver import changes, digest, find_checkpoint, load_settings

logger = logging.getLogger(__name__)

# What may differ without a word: it changes where and how a run works, not what it learns.
FREE_SECTIONS = (RunConfig, EvaluationConfig, CheckpointConfig)
FREE = {field.name for section in FREE_SECTIONS for field in dataclasses.fields(section)} | {
    "rollout_micro_batch_size",
    "reward_micro_batch_size",
    "loss_micro_batch_size",
    "offload_trajectories",
    "gradient_checkpointing",
    "free_text_encoders",
    "shard_weights",
    "max_skipped_iterations",
    "buffer_storage",
    "buffer_max_gb",
}
DECISIVE_IN_RUN = {"seed"}
STORED = {field.name for field in dataclasses.fields(TerminalConfig)} | {
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "resolution",
    "max_sequence_length",
    "rewards",
    "reward_scale",
    "advantages",
    "samples_per_prompt",
    "pairing",
    "transitions",
    "num_inference_steps",
    "rollout_guidance_scale",
    "guidance_mode",
}
"""Settings that targets, advantages and base velocities of stored rows depend on."""
FREE_OF_A_REWARD = {"batch_size", "device"}


def make_checkpoints(config: Config) -> Checkpoints:
    """The checkpoints of the output folder."""
    return Checkpoints(Path(config.run.output_dir), config.checkpoint.checkpoints_total_limit)


def settings_of(plan: Plan) -> dict[str, Any]:
    """Settings that decide what is learned, by flag, and a fingerprint of the training prompts."""
    sections = dataclasses.asdict(plan.config).values()
    flat = {name: value for section in sections for name, value in section.items()}
    free = FREE - DECISIVE_IN_RUN
    # A longer run begins like a shorter one, unless its length is in the schedule or in the choice of base
    # pictures.
    if flat["lr_scheduler"].startswith("constant") and flat["divergence"] == "kl":
        free = free | {"max_train_steps"}
    rewards = [{k: v for k, v in r.items() if k not in FREE_OF_A_REWARD} for r in flat["rewards"]]
    decisive = {name: value for name, value in flat.items() if name not in free}
    decisive |= {"rewards": rewards, "prompts of train_prompts": digest(plan.train_prompts)}
    # They are written into every checkpoint; compared redacted with redacted.
    return {name: redact_values(value) for name, value in decisive.items()}


def resume_point(plan: Plan, checkpoints: Checkpoints, processes: Processes) -> Path | None:
    """The checkpoint to go on from; None = start afresh. Says which in the log.

    Raises:
        CheckpointError: none is sound, or it was made with other settings and that isn't allowed.
    """
    if processes.is_main:
        checkpoints.clean()
    found = find_checkpoint(checkpoints, plan.config.checkpoint.resume_from_checkpoint, processes)
    if found is None:
        processes.accelerator.print("no checkpoint yet: starting from the base model")
        return None
    processes.accelerator.print(redact(f"going on from {found} after {iteration_of(found)} iterations"))
    check_settings(
        found, settings_of(plan), allow=plan.config.checkpoint.allow_config_change, processes=processes
    )
    return found


def outdated(folder: Path, now: Mapping[str, Any]) -> list[str]:
    """Changed settings that make rows stored in a checkpoint targets of another goal than the run's."""
    return [name for name in changes(load_settings(folder), now) if name in STORED]


def check_settings(folder: Path, now: Mapping[str, Any], *, allow: bool, processes: Processes) -> None:
    """Compare a checkpoint's settings with the run's.

    Raises:
        CheckpointError: if they differ and may not; lists the differences.
    """
    differing = changes(load_settings(folder), now)
    if not differing:
        return
    lines = "\n".join(f"  {name}: {change}" for name, change in differing.items())
    if not allow:
        raise CheckpointError(
            f"{folder} was made with other settings:\n{lines}\n"
            "put them back, choose another --output_dir, or go on with --allow_config_change"
        )
    processes.accelerator.print(f"going on with other settings:\n{lines}")
