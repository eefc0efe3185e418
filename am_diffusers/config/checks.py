"""Ranges of config values that need no file and no model."""

import dataclasses

from am_diffusers.config import (
    BaselinesConfig,
    CheckpointConfig,
    Config,
    DeterministicConfig,
    EfficientConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TerminalConfig,
)
from am_diffusers.config.belonging import END_POINTS, GRPO
from am_diffusers.config.optimizer import MicroBatch

Check = tuple[object, str, str]
"""Whether all is well, the flag, and what it must be."""


def check_values(config: Config) -> None:
    """Check every value's range.

    Raises:
        ValueError: naming every flag out of range, what it must be and what it is.
    """
    checks = [
        *_run(config.run),
        *_model(config.model),
        *_method(config.method),
        *_baselines(config.baselines, config.method.num_inference_steps),
        *_terminal(config.terminal),
        *_buffer(config),
        *_efficient(config.efficient),
        *_deterministic(config.deterministic, config.method.num_inference_steps),
        *_optimizer(config.optimizer),
        *_evaluation(config.evaluation),
        *_checkpoint(config.checkpoint),
        *_sharding(config),
        *_auto(config),
    ]
    values = {f: v for s in dataclasses.asdict(config).values() for f, v in s.items()}
    wrong = [f"--{name} must be {rule}, got {values[name]}" for good, name, rule in checks if not good]
    if wrong:
        raise ValueError("\n".join(wrong))


def _run(c: RunConfig) -> list[Check]:
    return [
        (c.push_to_hub or c.hub_model_id is None, "hub_model_id", "null without --push_to_hub"),
        (c.push_to_hub or not c.hub_private_repo, "hub_private_repo", "false without --push_to_hub"),
    ]


def _model(c: ModelConfig) -> list[Check]:
    return [
        (c.resolution > 0, "resolution", "a positive number of pixels"),
        (c.max_sequence_length > 0, "max_sequence_length", "a positive number of tokens"),
        (c.rank > 0, "rank", "positive"),
        (c.lora_alpha > 0, "lora_alpha", "positive"),
    ]


def _method(c: MethodConfig) -> list[Check]:
    return [
        (c.rewards, "rewards", "a list with at least one reward"),
        (c.num_inference_steps >= 2, "num_inference_steps", "at least 2: the last one is deterministic"),
        (c.samples_per_prompt >= 1, "samples_per_prompt", "at least 1"),
        (c.reward_scale > 0, "reward_scale", "positive: rewards are higher-is-better"),
        (
            c.adjoint == "lean" or c.rollout_guidance_scale == 1 or c.guidance_mode != "rollout",
            "adjoint",
            "lean with guidance in the rollout alone: the full adjoint differentiates what was rolled out "
            "(--guidance_mode everywhere or none)",
        ),
        (
            c.loss_steps == "all" or 1 <= c.loss_steps < c.num_inference_steps,
            "loss_steps",
            "'all' or from 1 to num_inference_steps - 1: the last step has no noise and no loss",
        ),
        (
            c.loss_steps != "all" or c.step_selection == "last_and_random",
            "step_selection",
            "left out with loss_steps all: there is nothing to select",
        ),
        (
            c.rollout_guidance_scale == 1 or c.guidance_mode != "none",
            "rollout_guidance_scale",
            "1 with guidance_mode none",
        ),
        (
            c.rollout_guidance_scale != 1 or c.guidance_mode != "everywhere",
            "rollout_guidance_scale",
            "other than 1 with guidance_mode everywhere",
        ),
        (
            c.mask_quantile is None or 0 < c.mask_quantile < 1,
            "mask_quantile",
            "in (0, 1), or null to keep every row",
        ),
        (0 <= c.sigma_jitter < 0.5, "sigma_jitter", "in [0, 0.5)"),
    ]


def _baselines(c: BaselinesConfig, steps: int) -> list[Check]:
    last = c.refl_last_steps
    return [
        (c.ram_noises >= 1, "ram_noises", "at least 1"),
        (1 <= c.draft_steps <= steps, "draft_steps", "from 1 to num_inference_steps"),
        (last is None or 1 <= last <= steps, "refl_last_steps", "from 1 to num_inference_steps, or null"),
        (c.grpo_passes >= 1, "grpo_passes", "at least 1"),
        (0 < c.grpo_clip_range < 1, "grpo_clip_range", "in (0, 1)"),
        (c.grpo_kl_weight >= 0, "grpo_kl_weight", "0 or positive"),
    ]


def _terminal(c: TerminalConfig) -> list[Check]:
    return [
        (c.divergence_q >= -1, "divergence_q", "at least -1"),
        (c.divergence_samples >= 2, "divergence_samples", "at least 2"),
        (c.divergence_prompts >= 1, "divergence_prompts", "at least 1"),
        (c.divergence_max_slope >= 1, "divergence_max_slope", "at least 1, the slope of kl"),
        (c.reward_smoothing_std >= 0, "reward_smoothing_std", "0 or positive"),
        (
            c.reward_smoothing_samples >= 2 and c.reward_smoothing_samples % 2 == 0,
            "reward_smoothing_samples",
            "an even number: copies come in opposite pairs",
        ),
        (
            c.reward_clip_quantile is None or 0 < c.reward_clip_quantile < 1,
            "reward_clip_quantile",
            "in (0, 1), or null to clip nothing",
        ),
    ]


def _buffer(c: Config) -> list[Check]:
    batch, used = c.optimizer.train_batch_size, c.method.method == "buffered_adjoint_matching"
    return [
        (
            not used or (c.buffer.buffer_size >= batch and c.buffer.buffer_size % batch == 0),
            "buffer_size",
            f"a multiple of train_batch_size, {batch}: it is filled and emptied a collection at a time",
        ),
        (
            not used or c.method.adjoint == "lean",
            "adjoint",
            "lean with a buffer: full adjoints depend on the policy, so that stored ones would be outdated",
        ),
        (c.buffer.buffer_refresh >= 1, "buffer_refresh", "at least 1"),
        (c.buffer.buffer_max_gb > 0, "buffer_max_gb", "positive"),
    ]


def _efficient(c: EfficientConfig) -> list[Check]:
    return [
        (c.eam_ode_steps >= 1, "eam_ode_steps", "at least 1"),
        (c.eam_rows >= 1, "eam_rows", "at least 1"),
        (c.eam_c > 0, "eam_c", "positive"),
        (0 < c.eam_sigma < 1, "eam_sigma", "in (0, 1)"),
        (c.eam_max_weight > 0, "eam_max_weight", "positive"),
    ]


def _deterministic(c: DeterministicConfig, num_inference_steps: int) -> list[Check]:
    return [
        (
            1 <= (c.truncate_steps or 1) <= num_inference_steps,
            "truncate_steps",
            "from 1 to num_inference_steps, or null for all steps",
        ),
        (c.cost_power > 1, "cost_power", "above 1, for a convex cost"),
    ]


def _optimizer(c: OptimizerConfig) -> list[Check]:
    return [
        (c.train_batch_size >= 1, "train_batch_size", "at least 1"),
        (c.max_train_steps >= 1, "max_train_steps", "at least 1"),
        (c.learning_rate > 0, "learning_rate", "positive"),
        (
            c.lr_scheduler != "constant" or c.lr_warmup_steps == 0,
            "lr_warmup_steps",
            "0 with lr_scheduler constant (constant_with_warmup has one)",
        ),
        (c.max_grad_norm > 0, "max_grad_norm", "positive"),
        (0 < c.ema_decay < 1, "ema_decay", "in (0, 1)"),
        (c.max_skipped_iterations >= 0, "max_skipped_iterations", "0 or positive"),
        (_is_size(c.rollout_micro_batch_size), "rollout_micro_batch_size", "at least 1, auto or null"),
        (_is_size(c.reward_micro_batch_size), "reward_micro_batch_size", "at least 1, auto or null"),
        (_is_size(c.loss_micro_batch_size), "loss_micro_batch_size", "at least 1 or auto"),
    ]


def _is_size(value: MicroBatch | None) -> bool:
    return value is None or value == "auto" or value >= 1


def _evaluation(c: EvaluationConfig) -> list[Check]:
    return [
        (c.num_validation_prompts >= 1, "num_validation_prompts", "at least 1"),
        (c.num_validation_images >= 1, "num_validation_images", "at least 1"),
        (c.validation_steps >= 1, "validation_steps", "at least 1"),
        ((c.early_stopping_patience or 1) >= 1, "early_stopping_patience", "at least 1 or null"),
        (c.eval_images_per_prompt >= 2, "eval_images_per_prompt", "at least 2, for diversity"),
        (c.eval_inference_steps >= 1, "eval_inference_steps", "at least 1"),
        (c.eval_batch_size >= 1, "eval_batch_size", "at least 1"),
    ]


def _checkpoint(c: CheckpointConfig) -> list[Check]:
    return [
        (c.checkpointing_steps >= 1, "checkpointing_steps", "at least 1"),
        ((c.checkpoints_total_limit or 1) >= 1, "checkpoints_total_limit", "at least 1 or null"),
        (c.resume_from_checkpoint, "resume_from_checkpoint", "latest or the path of a checkpoint"),
    ]


SIZES = ("rollout_micro_batch_size", "reward_micro_batch_size", "loss_micro_batch_size")


def _auto(c: Config) -> list[Check]:
    # What is tried are passes of Adjoint Matching; its relatives hold no more than those.
    tried = c.method.method not in END_POINTS + GRPO
    rule = f"a number: auto tries the passes of adjoint_matching, not those of {c.method.method}"
    return [(tried or getattr(c.optimizer, name) != "auto", name, rule) for name in SIZES]


def _sharding(c: Config) -> list[Check]:
    # A size that is tried and doesn't fit would leave the other processes waiting for their weights.
    return [
        (
            not c.model.shard_weights or getattr(c.optimizer, name) != "auto",
            name,
            "a number with shard_weights",
        )
        for name in SIZES
    ]
