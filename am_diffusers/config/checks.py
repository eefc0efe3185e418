"""Checks of config values that need no file and no model: ranges, and flags that the method doesn't read.

Ranges of the methods' flags, shared and own, are checked where these are defined.
"""

import dataclasses
import json
from pathlib import Path

from am_diffusers.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RunConfig,
)
from am_diffusers.config.optimizer import MicroBatch
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.ranges import Check
from am_diffusers.methods.parts.settings import FOR_ALL, SharedSettings
from am_diffusers.system.ranges import GUIDANCE, SEED, STEPS
from am_diffusers.system.resolution import RULE, is_resolution

SIZES = ("rollout_micro_batch_size", "reward_micro_batch_size", "loss_micro_batch_size")


def check_values(config: Config) -> None:
    """Check the ranges of the sections that belong to no method.

    Raises:
        ValueError: naming every flag out of range, what it must be and what it is.
    """
    checks = [
        *_run(config.run),
        *_model(config.model),
        *_prompts(config.prompts),
        *_method(config.method),
        *_optimizer(config.optimizer),
        *_evaluation(config.evaluation),
        *_checkpoint(config.checkpoint),
        *_guidance(config),
        *_certificate(config),
        *_sharding(config),
        *_auto(config),
    ]
    values = config.flags()
    wrong = [f"--{name} must be {rule}, got {values[name]}" for good, name, rule in checks if not good]
    if wrong:
        raise ValueError("\n".join(wrong))


def readers(flag: str) -> list[str] | None:
    """Return the methods that read a flag; None = all."""
    own = any(flag in _names(method.Settings) for method in METHODS.values())
    shared = flag in _names(SharedSettings) and flag not in FOR_ALL
    if not own and not shared and flag != "offload_trajectories":
        return None
    return [
        name for name, method in METHODS.items() if flag in method.reads or flag in _names(method.Settings)
    ]


def check_belonging(config: Config) -> None:
    """Check that no flag is set that the method doesn't read.

    Raises:
        ValueError: naming each such flag and the methods it belongs to.
    """
    method = config.method.method
    if method not in METHODS:
        return  # said with the nearest name by `make_plan`
    ignored = {}
    for section in config.sections().values():
        for field in dataclasses.fields(section):
            default, methods = _default(field), readers(field.name)
            if methods is None or method in methods or getattr(section, field.name) == default:
                continue
            text = default if isinstance(default, str) else json.dumps(default)
            ignored[field.name] = (
                f"--{field.name} is for {', '.join(methods)}, not for {method}: leave it out (to override a "
                f"config file pass --{field.name} {text})"
            )
    if ignored:
        raise ValueError("\n".join(ignored.values()))


def cautions(config: Config) -> list[str]:
    """Say what a user should know of these flags before the run, a sentence each."""
    return METHODS[config.method.method].cautions(config.shared, config.settings)


def _names(section: type) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _default(field: "dataclasses.Field[object]") -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _run(c: RunConfig) -> list[Check]:
    output, logs = Path(c.output_dir).resolve(), (Path(c.output_dir) / c.logging_dir).resolve()
    return [
        (SEED.holds(c.seed), "seed", SEED.rule),
        (logs.is_relative_to(output), "logging_dir", "a folder inside output_dir"),
        (c.push_to_hub or c.hub_model_id is None, "hub_model_id", "null without --push_to_hub"),
        (c.push_to_hub or not c.hub_private_repo, "hub_private_repo", "false without --push_to_hub"),
    ]


def _model(c: ModelConfig) -> list[Check]:
    return [
        (is_resolution(c.resolution), "resolution", RULE),
        (c.max_sequence_length > 0, "max_sequence_length", "a positive number of tokens"),
        (c.rank > 0, "rank", "positive"),
        (c.lora_alpha > 0, "lora_alpha", "positive"),
        (c.init_lora or not c.init_lora_as_base, "init_lora_as_base", "false without --init_lora"),
    ]


def _prompts(c: PromptConfig) -> list[Check]:
    return [(_is_count(c.max_train_prompts), "max_train_prompts", "at least 1 or null")]


def _method(c: MethodConfig) -> list[Check]:
    return [(c.rewards, "rewards", "a list with at least one reward")]


def _optimizer(c: OptimizerConfig) -> list[Check]:
    return [
        (c.train_batch_size >= 1, "train_batch_size", "at least 1"),
        (c.max_train_steps >= 1, "max_train_steps", "at least 1"),
        (c.learning_rate > 0, "learning_rate", "positive"),
        (
            c.lr_scheduler != "constant" or c.lr_warmup_steps == 0,
            "lr_warmup_steps",
            "0 with lr_scheduler constant (constant_with_warmup has a warm-up)",
        ),
        (c.lr_warmup_steps >= 0, "lr_warmup_steps", "0 or positive"),
        (0 <= c.adam_beta1 < 1, "adam_beta1", "in [0, 1)"),
        (0 <= c.adam_beta2 < 1, "adam_beta2", "in [0, 1)"),
        (c.adam_epsilon > 0, "adam_epsilon", "positive"),
        (c.adam_weight_decay >= 0, "adam_weight_decay", "0 or positive"),
        (c.max_grad_norm > 0, "max_grad_norm", "positive"),
        (0 < c.ema_decay < 1, "ema_decay", "in (0, 1)"),
        (c.max_skipped_iterations >= 0, "max_skipped_iterations", "0 or positive"),
        (_is_size(c.rollout_micro_batch_size), "rollout_micro_batch_size", "at least 1, auto or null"),
        (_is_size(c.reward_micro_batch_size), "reward_micro_batch_size", "at least 1, auto or null"),
        (_is_size(c.loss_micro_batch_size), "loss_micro_batch_size", "at least 1 or auto"),
    ]


def _is_size(value: MicroBatch | None) -> bool:
    return value == "auto" or _is_count(value)


def _is_count(value: int | None) -> bool:
    return value is None or value >= 1


def _evaluation(c: EvaluationConfig) -> list[Check]:
    return [
        (c.num_validation_prompts >= 1, "num_validation_prompts", "at least 1"),
        (c.num_validation_images >= 1, "num_validation_images", "at least 1"),
        (c.validation_steps >= 1, "validation_steps", "at least 1"),
        (_is_count(c.early_stopping_patience), "early_stopping_patience", "at least 1 or null"),
        (_is_count(c.max_eval_prompts), "max_eval_prompts", "at least 1 or null"),
        (c.certificate_images == 0 or c.certificate_images >= 8, "certificate_images", "at least 8, or 0"),
        (c.eval_images_per_prompt >= 2, "eval_images_per_prompt", "at least 2, for diversity"),
        (STEPS.holds(c.eval_inference_steps), "eval_inference_steps", STEPS.rule),
        (GUIDANCE.holds(c.eval_guidance_scale), "eval_guidance_scale", GUIDANCE.rule),
        (c.eval_batch_size >= 1, "eval_batch_size", "at least 1"),
    ]


def _checkpoint(c: CheckpointConfig) -> list[Check]:
    return [
        (c.checkpointing_steps >= 1, "checkpointing_steps", "at least 1"),
        (_is_count(c.checkpoints_total_limit), "checkpoints_total_limit", "at least 1 or null"),
        (c.resume_from_checkpoint, "resume_from_checkpoint", "latest or the path of a checkpoint"),
    ]


def _auto(c: Config) -> list[Check]:
    method = METHODS.get(c.method.method)  # an unknown one is refused with the nearest name by `make_plan`
    tried = method is None or method.finds_sizes
    rule = f"a number: auto does not know the passes of {c.method.method}"
    return [(tried or getattr(c.optimizer, name) != "auto", name, rule) for name in SIZES]


def _guidance(c: Config) -> list[Check]:
    guided = max(c.shared.rollout_guidance_scale, c.evaluation.eval_guidance_scale) > 1
    rule = "empty without guidance: --rollout_guidance_scale or --eval_guidance_scale above 1"
    return [(guided or not c.model.negative_prompt, "negative_prompt", rule)]


def _certificate(c: Config) -> list[Check]:
    images, options = c.evaluation.certificate_images, c.evaluation
    return [
        (
            c.shared.reward_scale != "auto" or images > 0 or options.frontier is not None,
            "certificate_images",
            "positive with reward_scale auto, or --frontier given",
        ),
        (
            options.early_stopping_metric != "tilt_gap" or (images > 0 and c.shared.divergence == "kl"),
            "early_stopping_metric",
            "gain without certificate_images, or with a divergence other than kl",
        ),
    ]


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
