"""Find the checkpoint to resume from and compare its settings with this run's."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from am_diffusers.config import CheckpointConfig, Config, EvaluationConfig, RunConfig
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.settings import GRADIENT
from am_diffusers.run.init_lora import init_lora_hashes
from am_diffusers.run.plan import Plan
from am_diffusers.system.files import digest
from am_diffusers.system.processes import Processes
from am_diffusers.system.text import redact, redact_values
from am_diffusers.training.checkpoint import Outdated, changes, load_settings
from am_diffusers.training.checkpoint_folder import CheckpointError, Checkpoints, iteration_of, verify

logger = logging.getLogger(__name__)

# Settings that may differ without notice: they change where and how a run works, not what it learns.
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
    *(flag for method in METHODS.values() for flag in method.free),
}
DECISIVE_IN_RUN = {"seed"}
GOAL = {
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "init_lora",
    "init_lora_as_base",
    "resolution",
    "max_sequence_length",
    "negative_prompt",
    "rewards",
    "reward_scale",
    "target_kl",
    "samples_per_prompt",
    "pairing",
    "transitions",
    "num_inference_steps",
    "rollout_guidance_scale",
    "guidance_mode",
    "adjoint",
    "mask_quantile",
    "tail_samples",
    "ode_tail",
    "row_weights",
    *GRADIENT,
    *(flag for method in METHODS.values() for flag in method.decisive),
}
"""Settings that targets, advantages, base velocities and masks of rows depend on, and so do all running means
of residuals and norms."""
PROMPTS = "prompts of train_prompts"
SHAPE = {"train_batch_size", "loss_steps", "step_selection", "late_step_odds", "seed", PROMPTS}
"""Settings that decide which rows there are and what each means: other rows don't fit beside them.

The seed and the prompts are among them as only texts that this run trains on are encoded, and a stored row
asks for its own. Not among them: buffer_size (it says how many of the last collections are read) and
sigma_jitter (a row has its own noise level)."""
FREE_OF_A_REWARD = {"batch_size", "device"}


def make_checkpoints(config: Config) -> Checkpoints:
    """Return the checkpoints of the output folder."""
    return Checkpoints(Path(config.run.output_dir), config.checkpoint.checkpoints_total_limit)


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return the settings that decide what is learned, by flag, and a fingerprint of the training prompts."""
    sections = plan.config.sections().values()
    flat = {k: v for section in sections for k, v in dataclasses.asdict(section).items()}
    flat["resolution"] = plan.config.model.size.setting
    free = FREE - DECISIVE_IN_RUN
    # A longer run begins like a shorter one, unless its length is in the schedule, in the choice of base
    # images or in the weights of rows.
    steady = flat["lr_scheduler"].startswith("constant") and flat["row_weights"] != "ramp"
    if steady and flat["divergence"] == "kl":
        free = free | {"max_train_steps"}
    if flat["rollout_guidance_scale"] == 1:  # then evaluation alone reads it
        free = free | {"negative_prompt"}
    if flat["init_lora"] is None:
        free = free | {"init_lora", "init_lora_as_base"}
    elif flat["init_lora_as_base"]:  # each start reads it anew: it must be the same, wherever it is
        flat["init_lora"] = init_lora_hashes(plan.config)
    rewards = [{k: v for k, v in r.items() if k not in FREE_OF_A_REWARD} for r in flat["rewards"]]
    decisive = {name: value for name, value in flat.items() if name not in free}
    decisive |= {"rewards": rewards, PROMPTS: digest(plan.train_prompts)}
    # They are written into every checkpoint; compared redacted with redacted.
    return {name: redact_values(value) for name, value in decisive.items()}


def resume_point(plan: Plan, checkpoints: Checkpoints, processes: Processes) -> Path | None:
    """Find the checkpoint to resume from and print it; None = start afresh.

    Raises:
        CheckpointError: none is sound, or it was made with other settings and that isn't allowed.
    """
    processes.on_main(checkpoints.clean)
    found = find_checkpoint(checkpoints, plan.config.checkpoint.resume_from_checkpoint, processes)
    if found is None:
        processes.accelerator.print("no checkpoint yet: starting from the base model")
        return None
    processes.accelerator.print(redact(f"resuming from {found} after {iteration_of(found)} iterations"))
    check_settings(
        found, settings_of(plan), allow=plan.config.checkpoint.allow_config_change, processes=processes
    )
    return found


def find_checkpoint(checkpoints: Checkpoints, wanted: str, processes: Processes) -> Path | None:
    """Find the checkpoint to resume from, the same on all processes; None = start afresh.

    Args:
        checkpoints: checkpoints of the output folder.
        wanted: `latest`, or the path of a checkpoint, or its name in the output folder.
        processes: processes of the run, of which the main one looks.

    Raises:
        CheckpointError: if none of the existing ones verifies, the one asked for doesn't, or newer ones
            beside it would be mistaken for this run's.
    """
    return processes.from_main(
        lambda: _latest(checkpoints) if wanted == "latest" else _explicit(checkpoints, wanted)
    )


def _latest(checkpoints: Checkpoints) -> Path | None:
    latest = checkpoints.latest()
    if latest is None and checkpoints.list():
        raise CheckpointError(
            f"{checkpoints.folder}: there are checkpoints and none is sound (see above): move them away to "
            "start afresh"
        )
    return latest


def _explicit(checkpoints: Checkpoints, wanted: str) -> Path:
    places = (Path(wanted), checkpoints.folder / wanted)
    path = next((place for place in places if place.is_dir()), None)
    if path is None:
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted}: no such folder, nor one in {checkpoints.folder}; pass "
            "latest, or a checkpoint-NUMBER folder"
        )
    verify(path)
    newer = [p for p in checkpoints.list() if iteration_of(p) > iteration_of(path)]
    if newer:
        names = ", ".join(p.name for p in newer)
        raise CheckpointError(
            f"{checkpoints.folder} holds newer checkpoints ({names}) than {path.name}: move them away, or "
            "choose another --output_dir"
        )
    return path


def outdated(folder: Path, now: Mapping[str, Any]) -> Outdated:
    """Return changed settings that make a method's rows or means in a checkpoint unfit for this run."""
    changed = changes(load_settings(folder), now)
    return Outdated(
        rows=[name for name in changed if name in GOAL | SHAPE],
        means=[name for name in changed if name in GOAL],
    )


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
            "put them back, choose another --output_dir, or resume with --allow_config_change"
        )
    processes.accelerator.print(f"resuming with other settings:\n{lines}")
