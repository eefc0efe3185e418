"""The protocol of a reward, sums of rewards, and the checks of images and prompts.

A reward maps images in [0, 1] and their prompts to one number per image; higher is better.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

Mode = Literal["differentiable", "rounded", "official"]


class Reward(Protocol):
    """Function that scores images for prompts; higher is better."""

    @property
    def name(self) -> str:
        """Short name used in configs and logs."""
        ...

    @property
    def differentiable(self) -> bool:
        """True if scores have gradients with respect to the images."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of `images` (B, 3, H, W) in [0, 1] for their B `prompts`."""
        ...


class Column(NamedTuple):
    """Column of a reward in papers: its title, and the number of digits behind the point."""

    title: str
    decimals: int = 3


@dataclass(frozen=True)
class RewardOptions:
    """Settings of a reward with weights.

    Attributes:
        mode: preparation of the images. "differentiable" keeps everything in float tensors; "rounded" adds
            the 8-bit roundings of the published scorer with straight-through gradients; "official" is the
            published path itself and has no gradients.
        device: device of the network; images are moved there and scores stay there.
        dtype: dtype of the network; scores are computed from its features in float32 or better.
        batch_size: images per pass of the network; None: all.
        checkpointing: recompute each pass of the network in backward, so that only the activations of one
            pass (`batch_size` images) are held at a time.

    Raises:
        ValueError: if `mode` is unknown or `batch_size` not positive.
    """

    mode: Mode = "differentiable"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(
                f"expected the mode of a reward to be one of {get_args(Mode)}, got {self.mode!r}"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"expected a reward batch_size of at least 1 or none, got {self.batch_size}")


DIFFERENTIABLE, OFFICIAL = RewardOptions(), RewardOptions("official")


@dataclass(frozen=True)
class RewardScale:
    """Scale of a reward in a sum: weight * (score - mean) / std.

    Attributes:
        weight: finite; a negative weight penalises. Counts base standard deviations once calibrated.
        mean: mean score of base samples, in the reward's units.
        std: standard deviation of the scores of base samples, > 0.

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
    """Network whose features of images differ in direction as the images differ in looks; many rewards."""

    @property
    def name(self) -> str:
        """Short name used in logs."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Return features (B, D), of any length, of `images` (B, 3, H, W) in [0, 1]."""
        ...


class WeightedRewards:
    """Weighted sum of rewards, itself a reward, that keeps the scores of each reward for the log.

    Args:
        rewards: rewards with different names.
        scales: scale of each reward in the sum.

    Raises:
        ValueError: if there are no rewards, counts differ, or two share a name.
    """

    def __init__(self, rewards: Sequence[Reward], scales: Sequence[RewardScale]) -> None:
        names = [reward.name for reward in rewards]
        if not rewards or len(rewards) != len(scales):
            raise ValueError(f"expected one weight per reward, got {len(scales)} weights for rewards {names}")
        if len(set(names)) < len(names):
            raise ValueError(f"expected rewards with different names, got {names}: give each reward once")
        self._rewards = tuple(rewards)
        self.scales = dict(zip(names, scales, strict=True))
        self.name = "+".join(names)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self._seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return `sum_i weight_i * (reward_i - mean_i) / std_i`, (B,)."""
        total = []
        for reward in self._rewards:
            # A reward may run on a device of its own.
            score, scale = reward(images, prompts).to(images.device), self.scales[reward.name]
            self._seen[reward.name].append(score.detach())
            total.append(scale.weight * (score - scale.mean) / scale.std)
        return torch.stack(total).sum(0)

    def drain(self) -> dict[str, Tensor]:
        """Return the scores (N,) of each reward since the last call, in the reward's units."""
        scores = {name: torch.cat(seen) for name, seen in self._seen.items() if seen}
        for seen in self._seen.values():
            seen.clear()
        return scores


class FixedReward(ABC):
    """Reward that is built without arguments; see `Reward`.

    Attributes:
        name: short name used in logs.
        differentiable: whether scores have gradients with respect to the images.
        evaluates_only: whether it judges what others train, and must not be trained itself.
    """

    name: str
    differentiable: bool = True
    evaluates_only: bool = False

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of `images` (B, 3, H, W) in [0, 1] for their B `prompts`."""

    @classmethod  # noqa: B027
    def check_installed(cls) -> None:
        """Raise ValueError if a package is missing, with the command that installs it."""

    def check_can_score(self, prompts: Sequence[str]) -> None:  # noqa: B027
        """Raise ValueError for a prompt that the reward can't score, before a run starts."""


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a floating-point (B, 3, H, W) tensor, finite and in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"expected floating-point images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}:"
            " rewards take what `decode` returns"
        )
    low, high = torch.stack(images.detach().aminmax()).tolist()  # one read: a card waits; NaN comes through
    if not (math.isfinite(low) and math.isfinite(high)):
        rows = (~images.detach().isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"expected finite images, got NaN or infinity in rows {rows}: decode in float32")
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
