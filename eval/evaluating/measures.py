"""What is measured on pictures: published scores of rewards, and image features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from am_diffusers.features import FEATURES
from torch import Tensor

from am_diffusers.command_line import asset_path
from am_diffusers.config import RewardConfig
from am_diffusers.plan import resolve_reward
from am_diffusers.rewards import REWARDS, ImageFeatures, LearnedReward, RewardOptions
from am_diffusers.suggest import suggest
from evaluating.options import named

Function = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Measure:
    """Something that is measured on each picture.

    Attributes:
        kind: `rewards` (one number, higher is better) or `features` (a vector).
        name: a key of `REWARDS`, or of `FEATURES`.
        model: where its weights are; None = it has none.
    """

    kind: Literal["rewards", "features"]
    name: str
    model: str | None

    @property
    def identity(self) -> str:
        """What its values were made by."""
        return f"{self.name}={self.model}"

    def load(self, device: torch.device, batch_size: int | None, prompts: Sequence[str]) -> Function:
        """Pictures (n, 3, H, W) in [0, 1] and n prompts to values (n,) or (n, D), float.

        Args:
            device: where it runs.
            batch_size: pictures a pass.
            prompts: all that it will have to score.

        Raises:
            ValueError: if the weights are missing or don't fit, or it can't score a prompt.
        """
        options = RewardOptions("official", device=device, batch_size=batch_size)
        if self.kind == "features" and self.name in FEATURES:
            features = FEATURES[self.name].from_pretrained(asset_path(self.model or ""), options=options)
            return lambda images, _: features.image_features(images)
        kind = REWARDS[self.name]
        if not issubclass(kind, LearnedReward):
            return kind()
        reward = kind.from_pretrained(asset_path(self.model or kind.released), options=options)
        if self.kind == "rewards":
            reward.check_can_score(prompts)
            return reward
        if not isinstance(reward, ImageFeatures):
            raise ValueError(f"--features {self.name}: this reward has no image features")
        encode = reward.image_features
        return lambda images, _: encode(images)


def choose_rewards(asked: Sequence[str], declared: dict[str, str]) -> list[Measure]:
    """The rewards of `--rewards`, `declared` ones with the model's own weights.

    Raises:
        ValueError: unknown or repeated name, or no such weights; says what to do.
    """
    chosen = []
    for text in asked:
        name, model = named(text)
        resolved = resolve_reward(RewardConfig(name, model or declared.get(name)))
        chosen.append(Measure("rewards", name, resolved.model))
    return _each_once(chosen, "--rewards")


def choose_features(
    asked: Sequence[str] | None, rewards: Sequence[Measure], declared: dict[str, str]
) -> list[Measure]:
    """The features of `--features`; None = those of the last reward that has some.

    Raises:
        ValueError: unknown or repeated name, or a reward without image features.
    """
    usable = [name for name, kind in REWARDS.items() if hasattr(kind, "image_features")]
    if asked is None:
        own = [reward for reward in rewards if reward.name in usable]
        return [Measure("features", reward.name, reward.model) for reward in own[-1:]]
    weights = {reward.name: reward.model for reward in rewards}
    chosen = []
    for text in asked:
        name, model = named(text)
        if name in FEATURES:
            model = model or FEATURES[name].released
        elif name in usable:
            given = model or weights.get(name) or declared.get(name)
            model = resolve_reward(RewardConfig(name, given)).model
        else:
            raise ValueError(f"--features: unknown features {suggest(name, [*FEATURES, *usable])}")
        chosen.append(Measure("features", name, model))
    return _each_once(chosen, "--features")


def _each_once(chosen: list[Measure], flag: str) -> list[Measure]:
    names = [measure.name for measure in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"{flag}: each name once, got {' '.join(names)}")
    return chosen
