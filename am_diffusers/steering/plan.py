"""Plan of an optimisation: the command line, checked before any weights are read."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from am_diffusers.config import RewardConfig
from am_diffusers.models.base import without_weights
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.schedulers import check_solver
from am_diffusers.prompts.rows import check_unicode
from am_diffusers.prompts.sets import load_texts
from am_diffusers.rewards import REWARDS
from am_diffusers.run.checked_rewards import resolve_reward
from am_diffusers.steering.options import Options
from am_diffusers.steering.results import RESULTS, SAVED_AS
from am_diffusers.system.files import read_declaration
from am_diffusers.transitions import TRANSITIONS


@dataclass(frozen=True)
class Plan:
    """Plan of an optimisation.

    Attributes:
        options: the command line.
        source: the pipeline.
        prompts: P texts.
        side: images are side x side pixels.
        max_sequence_length: T5 tokens.
        rewards: rewards that are climbed, with their weights.
        held_out: rewards that are only printed.
    """

    options: Options
    source: Pretrained
    prompts: tuple[str, ...]
    side: int
    max_sequence_length: int
    rewards: tuple[RewardConfig, ...]
    held_out: tuple[RewardConfig, ...]


def make_plan(options: Options) -> Plan:
    """Check what was asked for and read the prompts.

    Raises:
        ValueError: what is wrong and what to do about it.
    """
    _check_work(options)
    prompts = options.prompts or load_texts(options.prompt_file or "")
    check_unicode("--prompts", prompts)
    source = Pretrained(options.model, options.revision, options.variant)
    declared = read_declaration(source.path)
    side = options.resolution or source.family.resolution(source.config_of)
    source.family.latent_shape(source.config_of, side, side)
    length = options.max_sequence_length or declared.get("max_sequence_length", 256)
    source.family.check_length(length)
    if options.optimize == "embeddings":
        check_takes_embeddings(source.family.pipeline)
    if options.lora is not None:
        without_weights(source).load_lora(options.lora)
    rewards, held_out = _rewards(options, declared.get("rewards", {}))
    if (options.output / RESULTS).exists():
        raise ValueError(f"--output {options.output} holds the results of another call: name a new folder")
    return Plan(options, source, tuple(prompts), side, length, rewards, held_out)


def check_takes_embeddings(pipeline: type) -> None:
    """Raise a ValueError unless a pipeline's call takes prompt embeddings."""
    if SAVED_AS["embeddings"] not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(
            f"--optimize embeddings: {pipeline.__name__} takes no prompt embeddings: use --optimize noise"
        )


def _check_work(options: Options) -> None:
    if options.optimize is None and options.best_of is None and not options.sample:
        raise ValueError("nothing to do: pass --optimize noise or embeddings, --best_of N or --sample")
    if options.sample and options.optimize == "embeddings":
        raise ValueError("--sample draws noise: leave --optimize embeddings out")
    if options.sample and (options.chain_steps < 8 or options.thin > options.chain_steps):
        raise ValueError("--sample needs --chain_steps of at least 8 and --thin of at most --chain_steps")
    if options.sampler not in TRANSITIONS:
        raise ValueError(
            f"--sampler {options.sampler}: gradients need a table of steps, one of {', '.join(TRANSITIONS)}"
        )
    check_solver(options.sampler, options.num_inference_steps)
    if options.sampler != "ode_euler" and (options.optimize == "noise" or options.sample):
        flag = "--sample" if options.sample else "--optimize noise"
        raise ValueError(
            f"{flag}: the starting noise of {options.sampler} doesn't move its image, which is made of the "
            "noise of its steps: use --sampler ode_euler, or --optimize embeddings"
        )
    if options.gradient_steps is not None:
        if options.gradient == "exact":
            raise ValueError(
                "--gradient_steps is for --gradient deis1 and deis2: exact takes the sampler's steps"
            )
        if options.gradient_steps > options.num_inference_steps:
            raise ValueError(
                f"--gradient_steps {options.gradient_steps}: at most --num_inference_steps "
                f"{options.num_inference_steps}, whose states it is computed at"
            )


def _rewards(
    options: Options, declared: dict[str, str]
) -> tuple[tuple[RewardConfig, ...], tuple[RewardConfig, ...]]:
    weights = options.weights or [1.0] * len(options.rewards)
    if len(weights) != len(options.rewards):
        raise ValueError(
            f"--weights: {len(weights)} numbers for {len(options.rewards)} rewards: one for each"
        )
    climbed = [_reward(text, declared, weight) for text, weight in zip(options.rewards, weights, strict=True)]
    held_out = [_reward(text, declared, 1.0) for text in options.held_out_rewards]
    names = [each.name for each in [*climbed, *held_out]]
    if len(set(names)) < len(names):
        raise ValueError(f"--rewards and --held_out_rewards: give each name once, got {' '.join(names)}")
    _check_trainable(climbed, needs_gradient=options.optimize is not None or options.sample)
    return tuple(climbed), tuple(held_out)


def _check_trainable(rewards: Sequence[RewardConfig], *, needs_gradient: bool) -> None:
    for name in (each.name for each in rewards):
        if getattr(REWARDS[name], "evaluates_only", False):
            raise ValueError(f"--rewards {name} judges what others climb: name it in --held_out_rewards")
        if needs_gradient and REWARDS[name].differentiable is False:
            usable = ", ".join(key for key, kind in REWARDS.items() if kind.differentiable is not False)
            raise ValueError(f"--rewards {name} has no gradient: only --best_of takes it; with one: {usable}")


def _reward(text: str, declared: dict[str, str], weight: float) -> RewardConfig:
    name, _, model = text.partition("=")
    return resolve_reward(RewardConfig(name, model or declared.get(name), weight=weight))
