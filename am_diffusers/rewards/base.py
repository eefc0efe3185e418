"""What a reward is, sums of rewards, and the checks of their input.

A reward maps images in [0, 1] and their prompts to one number per image; higher is better.
"""

from collections.abc import Sequence
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


@runtime_checkable
class ImageFeatures(Protocol):
    """What gives pictures features whose distances say how different they look, as many rewards do."""

    @property
    def name(self) -> str:
        """Short name used in logs."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, D) of length 1 of `images` (B, 3, H, W) in [0, 1]."""
        ...


class WeightedRewards:
    """The weighted sum of several rewards, itself a reward.

    Args:
        rewards: the rewards, each under a name of its own.
        weights: one finite weight per reward; negative ones penalise.

    Raises:
        ValueError: if there are no rewards, counts differ, a weight isn't finite, or two share a name.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        names = [reward.name for reward in rewards]
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"expected one weight per reward, got weights {list(weights)} for {names}")
        if len(set(names)) < len(names):
            raise ValueError(f"expected rewards with different names, got {names}: give each reward once")
        if not torch.tensor(weights, dtype=torch.float64).isfinite().all():
            raise ValueError(f"expected finite weights, got {list(weights)} for {names}")
        self._rewards = tuple(rewards)
        self.weights = dict(zip(names, weights, strict=True))
        self.name = "+".join(names)
        self.differentiable = all(reward.differentiable for reward in rewards)

    def components(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The unweighted scores (B,) of each reward, by name."""
        return {reward.name: reward(images, prompts) for reward in self._rewards}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """`sum_i weight_i * reward_i`, (B,)."""
        scores = self.components(images, prompts)
        return torch.stack([weight * scores[name] for name, weight in self.weights.items()]).sum(0)


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
