"""Measures of images: published scores of rewards, image features, and how far an image moved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from am_diffusers.config import RewardConfig
from am_diffusers.rewards import REWARDS, ImageFeatures, LearnedReward, Reward, RewardOptions
from am_diffusers.run.checked_rewards import resolve_reward
from am_diffusers.system.files import asset_path
from am_diffusers.system.text import suggest
from evaluating.measuring.features import FEATURES, LPIPS, Features
from evaluating.measuring.weights import fingerprint
from evaluating.options import named

Function = Callable[[Tensor, Sequence[str], Tensor], Tensor]
"""Images (n, 3, H, W) in [0, 1], prompts, the base's images from the same noise -> (n,) or (n, D)."""


@dataclass(frozen=True)
class Measure:
    """Something that is measured on each image.

    Attributes:
        kind: `rewards` (one number, higher is better), `features` (a vector) or `changes` (a distance to the
            base's image from the same noise; of tuned candidates only).
        name: a key of `REWARDS` or of `FEATURES`, or `lpips`.
        model: place of its weights; None = it has none.
    """

    kind: Literal["rewards", "features", "changes"]
    name: str
    model: str | None

    @property
    def identity(self) -> str:
        """Fingerprint of what its values are made by; for a hub id known once it is downloaded."""
        return f"{self.name}={self.model} {self.weights}".strip()

    @property
    def weights(self) -> str:
        """Fingerprint of its weights."""
        return fingerprint(self.model)

    def load(self, device: torch.device, batch_size: int | None, prompts: Sequence[str]) -> Function:
        """Load the weights and return the function that measures.

        Args:
            device: device it runs on.
            batch_size: images per pass.
            prompts: all prompts that it will have to score.

        Raises:
            ValueError: if the weights are missing or don't fit, or it can't score a prompt.
        """
        if self.kind == "changes":
            distance = LPIPS.from_pretrained(device=device)
            size = batch_size or 1
            return lambda images, _, base: torch.cat(
                [distance(*pair) for pair in zip(images.split(size), base.split(size), strict=True)]
            )
        if self.kind == "features":
            encode = self._features(device, batch_size).image_features
            return lambda images, *_: encode(images)
        reward = self._reward(device, batch_size)
        if isinstance(reward, LearnedReward):
            reward.check_can_score(prompts)
        return lambda images, texts, _: reward(images, texts)

    def _features(self, device: torch.device, batch_size: int | None) -> ImageFeatures | Features:
        if self.name in FEATURES:
            kind = FEATURES[self.name]
            path = asset_path(self.model or kind.released)
            return kind.from_pretrained(path, device=device, batch_size=batch_size)
        reward = self._reward(device, batch_size)
        if not isinstance(reward, ImageFeatures):
            raise ValueError(f"--features {self.name}: this reward has no image features")
        return reward

    def _reward(self, device: torch.device, batch_size: int | None) -> Reward:
        kind = REWARDS[self.name]
        if not issubclass(kind, LearnedReward):
            return kind()
        options = RewardOptions("official", device=device, batch_size=batch_size)
        return kind.from_pretrained(asset_path(self.model or kind.released), options=options)


def choose_rewards(asked: Sequence[str], declared: Mapping[str, str]) -> list[Measure]:
    """Return the rewards of `--rewards`, `declared` ones with the model's own weights.

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
    asked: Sequence[str] | None,
    rewards: Sequence[Measure],
    declared: Mapping[str, str],
    trained: Mapping[str, Sequence[str]],
) -> list[Measure]:
    """Return the features of `--features`; None = those of the last reward with some, if possible held-out.

    Raises:
        ValueError: unknown or repeated name, or a reward without image features.
    """
    usable = [name for name, kind in REWARDS.items() if hasattr(kind, "image_features")]
    if asked is None:
        fooled = {name for names in trained.values() for name in names}
        own = sorted(
            (each for each in rewards if each.name in usable), key=lambda each: each.name not in fooled
        )
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
        raise ValueError(f"{flag}: give each name once, got {' '.join(names)}")
    return chosen
