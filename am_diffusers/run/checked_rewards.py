"""Check the rewards of a config, and that its method can train them; no weights are read."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from am_diffusers.config import Config, RewardConfig
from am_diffusers.methods import METHODS
from am_diffusers.rewards import REWARDS, LearnedReward, RewardScale
from am_diffusers.rewards.parts.packaged import PACKAGED
from am_diffusers.system.files import asset_path
from am_diffusers.system.text import suggest


def resolve(config: Config) -> Config:
    """Fill in released weights and held-out rewards where the config leaves them out."""
    evaluation = config.evaluation
    trained = [resolve_reward(reward) for reward in config.method.rewards]
    held_out = evaluation.eval_rewards
    if evaluation.eval_prompts is None:
        if held_out:
            raise ValueError("--eval_rewards needs --eval_prompts: add held-out prompts, or leave it out")
        held_out = []
    elif held_out is None:
        held_out = [RewardConfig(_other_reward([reward.name for reward in trained]))]
    return replace(
        config,
        method=replace(config.method, rewards=trained),
        evaluation=replace(evaluation, eval_rewards=[resolve_reward(reward) for reward in held_out]),
    )


def check_devices(config: Config, num_processes: int) -> None:
    """Check the devices that rewards ask for.

    Raises:
        ValueError: no name of a device; one card for the rewards of several processes, each of which has its
            own; or a card that this machine doesn't have, unless the run is dry and may be another machine's.
    """
    for reward in [*config.method.rewards, *(config.evaluation.eval_rewards or [])]:
        if reward.device is None:
            continue
        try:
            device = torch.device(reward.device)
        except RuntimeError as error:
            raise ValueError(
                f"rewards: {reward.name}: device must be null, cpu or a card such as cuda:1, got "
                f"{reward.device!r}"
            ) from error
        if device.index is not None and num_processes > 1:
            raise ValueError(
                f"rewards: {reward.name}: device {device} would hold the reward of all {num_processes} "
                "processes, beside the model of one: leave device out, and each scores on its own card"
            )
        there = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= there and not config.run.dry_run:
            raise ValueError(
                f"rewards: {reward.name}: there is no device {device}: this machine shows {there} cards"
            )


def _other_reward(trained: list[str]) -> str:
    for name in ("hpsv2", "pickscore"):
        if name not in trained:
            return name
    raise ValueError("pickscore and hpsv2 are both trained: name a held-out reward in --eval_rewards")


def resolve_reward(reward: RewardConfig) -> RewardConfig:
    """Fill in the weights of a reward, and check that they can exist; nothing is loaded.

    Raises:
        ValueError: unknown name (with the nearest known one), numbers that make no sense, or no such file.
    """
    RewardScale(reward.weight, reward.mean, reward.std)  # checks its numbers
    if reward.batch_size is not None and reward.batch_size < 1:
        raise ValueError(
            f"rewards: {reward.name}: batch_size must be at least 1 or null, got {reward.batch_size}"
        )
    kind = REWARDS.get(reward.name)
    if kind is None:
        raise ValueError(f"rewards: unknown reward {suggest(reward.name, REWARDS)}")
    if not issubclass(kind, LearnedReward):
        if reward != RewardConfig(reward.name, weight=reward.weight, mean=reward.mean, std=reward.std):
            raise ValueError(f"rewards: {reward.name} has no weights: it takes only weight, mean and std")
        kind.check_installed()
        return reward
    model = reward.model or kind.released
    if model in PACKAGED:
        PACKAGED[model].find()
    elif not Path(asset_path(model)).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+){1,2}", model):
        raise ValueError(f"rewards: {reward.name}: no such file or folder: {model}")
    return replace(reward, model=model)


def check_method(config: Config) -> None:
    """Check that the method is known and can train these rewards.

    Raises:
        ValueError: what doesn't fit, and what does.
    """
    method = METHODS.get(config.method.method)
    if method is None:
        raise ValueError(f"--method: unknown method {suggest(config.method.method, METHODS)}")
    trained = [reward.name for reward in config.method.rewards]
    judges = [name for name in trained if getattr(REWARDS[name], "evaluates_only", False)]
    if judges:
        raise ValueError(f"rewards: {judges[0]} judges what others train: name it in eval_rewards instead")
    names = trained + [reward.name for reward in config.evaluation.eval_rewards or []]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards and eval_rewards must differ in name, got {names}: merge their weights")
    if method.needs_reward_gradient:
        _check_gradients(config)
    if method.compares_samples and config.shared.samples_per_prompt < 2:
        raise ValueError(
            f"{config.method.method} compares samples of a prompt: set --samples_per_prompt to 2 or more and "
            "--train_batch_size to a multiple of it on each process"
        )


def _check_gradients(config: Config) -> None:
    # A learned reward is differentiable in every mode but the official one; the others say it on the class.
    trained = config.method.rewards
    needs = f"is not differentiable and {config.method.method} needs its gradient: use"
    blocked = [reward.name for reward in trained if REWARDS[reward.name].differentiable is False]
    if blocked:
        usable = [name for name, kind in REWARDS.items() if kind.differentiable is not False]
        raise ValueError(f"reward {blocked[0]} {needs} one of {', '.join(usable)}")
    official = [reward.name for reward in trained if reward.mode == "official"]
    if official:
        raise ValueError(f"reward {official[0]} in mode official {needs} mode differentiable or rounded")
