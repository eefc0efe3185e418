"""Configs of the runs that LoRAs came from: the config.yaml that `finetune.py` writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from am_diffusers.models.origin import Origin, read_origin
from am_diffusers.rewards import RewardScale
from evaluating.candidates import Candidate
from evaluating.summary.tilt import Target


def run_config(lora: Path) -> dict[str, Any]:
    """Read the config of the run that a LoRA file came from, or what the LoRA says of it; {} = unknown.

    The config is beside the LoRA, or one folder up if that is a checkpoint or an average. Only a file that
    reads as one of this package counts, as other tools write a config.yaml too, and one that agrees with the
    LoRA: another run may have been started in its folder.
    """
    origin = read_origin(lora)
    for folder in lora.resolve().parents[:2]:
        try:
            found = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if _is_ours(found) and (origin is None or _agrees(found, origin)):
            return found
    return {} if origin is None else _told(origin)


def _is_ours(config: object) -> bool:
    if not isinstance(config, dict):
        return False
    rewards, texts = config.get("rewards"), ("pretrained_model_name_or_path", "train_prompts")
    return (
        all(isinstance(config.get(name), str) for name in texts)
        and isinstance(rewards, list)
        and all(isinstance(reward, dict) and isinstance(reward.get("name"), str) for reward in rewards)
    )


def _told(origin: Origin) -> dict[str, Any]:
    """Return what a LoRA says of its run under the names that a config has."""
    named = ("method", "divergence", "reward_scale", "seed")
    rewards = [asdict(reward) for reward in origin.rewards]
    own = {"pretrained_model_name_or_path": origin.base_model, "rewards": rewards}
    if origin.init_lora is not None:
        own |= {"init_lora": origin.init_lora, "init_lora_as_base": True}
    return own | {name: getattr(origin, name) for name in named}


def _agrees(config: Mapping[str, Any], origin: Origin) -> bool:
    told, rewards = _told(origin), config["rewards"]
    same = [
        all(reward.get(name) == value for name, value in each.items())
        for reward, each in zip(rewards, told.pop("rewards"), strict=False)
    ]
    return (
        bool(config.get("init_lora_as_base")) == (origin.init_lora is not None)
        and len(same) == len(rewards) == len(origin.rewards)
        and all(same)
        and all(config.get(name) == value for name, value in told.items())
    )


def run_configs(candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """Read the config of each LoRA's run by its name, where it is known."""
    found = {candidate.name: run_config(candidate.lora) for candidate in candidates if candidate.lora}
    return {name: config for name, config in found.items() if config}


def trained_rewards(candidates: Sequence[Candidate]) -> dict[str, tuple[str, ...]]:
    """Return the names of the rewards each LoRA was trained on, where its run is known."""
    return {
        name: tuple(reward["name"] for reward in config["rewards"])
        for name, config in run_configs(candidates).items()
    }


def targets(candidates: Sequence[Candidate]) -> dict[str, Target]:
    """Return the law that the run of each LoRA aimed at, where it is known and a tilt of the base."""
    found = {name: _target(config) for name, config in run_configs(candidates).items()}
    return {name: target for name, target in found.items() if target is not None}


def _target(config: Mapping[str, Any]) -> Target | None:
    """Read what a run aimed at; None for another divergence or base, or where a number lacks or is spoilt."""
    if config.get("divergence") != "kl" or config.get("init_lora_as_base"):
        return None
    try:
        scale = float(config["reward_scale"])
        rewards = {each["name"]: _scale_of(each) for each in config["rewards"]}
    except (KeyError, TypeError, ValueError):
        return None
    return Target(scale, rewards) if 0 < scale < math.inf else None


def _scale_of(reward: Mapping[str, Any]) -> RewardScale:
    return RewardScale(*(float(reward[name]) for name in ("weight", "mean", "std")))
