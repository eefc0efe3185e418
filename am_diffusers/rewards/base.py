"""What a reward is, sums of rewards, and the checks of their input.

A reward maps images in [0, 1] and their prompts to one number per image; higher is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Reward(Protocol):
    """Scores of images for prompts; higher is better."""

    @property
    def name(self) -> str:
        """Short name used in configs and logs."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether scores have gradients with respect to the images."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of `images` (B, 3, H, W) in [0, 1] for their B `prompts`."""
        ...


@dataclass(frozen=True)
class RewardScale:
    """How a reward enters a sum: weight * (score - mean) / std.

    Attributes:
        weight: finite; a negative one penalises. Counts base standard deviations once calibrated.
        mean: mean score of base samples, in the reward's units.
        std: standard deviation of their scores, > 0.

    Raises:
        ValueError: if a number isn't finite or std isn't positive.
    """

    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"expected finite weight and mean and a std > 0, got {self}")


@runtime_checkable
class ImageFeatures(Protocol):
    """What gives pictures features whose directions say how different they look, as many rewards do."""

    @property
    def name(self) -> str:
        """Short name used in logs."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, D), of any length, of `images` (B, 3, H, W) in [0, 1]."""
        ...


class WeightedRewards:
    """A weighted sum of rewards, itself a reward, that keeps the scores of its parts for the log.

    Args:
        rewards: the rewards, each under a name of its own.
        scales: how each enters the sum.

    Raises:
        ValueError: if there are no rewards, counts differ, or two share a name.
    """

    def __init__(self, rewards: Sequence[Reward], scales: Sequence[RewardScale]) -> None:
        names = [reward.name for reward in rewards]
        if not rewards or len(rewards) != len(scales):
            raise ValueError(f"expected one weight per reward, got {len(scales)} for {names}")
        if len(set(names)) < len(names):
            raise ValueError(f"expected rewards with different names, got {names}: give each reward once")
        self._rewards = tuple(rewards)
        self.scales = dict(zip(names, scales, strict=True))
        self.name = "+".join(names)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self._seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """`sum_i weight_i * (reward_i - mean_i) / std_i`, (B,)."""
        total = []
        for reward in self._rewards:
            # A reward may run on a device of its own.
            score, scale = reward(images, prompts).to(images.device), self.scales[reward.name]
            self._seen[reward.name].append(score.detach())
            total.append(scale.weight * (score - scale.mean) / scale.std)
        return torch.stack(total).sum(0)

    def drain(self) -> dict[str, Tensor]:
        """Scores (N,) of each reward, in its own units, since the last call."""
        scores = {name: torch.cat(seen) for name, seen in self._seen.items() if seen}
        for seen in self._seen.values():
            seen.clear()
        return scores


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a floating-point (B, 3, H, W) tensor, finite and in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"expected floating-point images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}:"
            " rewards take what `decode` returns"
        )
    finite = images.detach().isfinite().flatten(1).all(1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"expected finite images, got NaN or infinity in rows {rows}: decode in float32")
    low, high = (value.item() for value in images.detach().aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"expected images in [0, 1], got [{low:.4g}, {high:.4g}]: map with `(x / 2 + 0.5).clamp(0, 1)`"
        )


def check_prompts(prompts: Sequence[str], num_images: int) -> None:
    """Raise ValueError unless there is one non-empty prompt per image."""
    if isinstance(prompts, str) or len(prompts) != num_images:
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"expected a list of one prompt per image, got {got} for {num_images} images")
    empty = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise ValueError(f"expected non-empty prompts, got empty ones in rows {empty}: leave them out")
