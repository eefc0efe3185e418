"""Rewards as numbers, and how much better a sample is than the others of its prompt.

Methods that need values only work for any reward: one that isn't differentiable, or the published scorer
itself. They compare the G neighbouring samples of an iteration that share a prompt:

    centred     A_i = reward_scale * (r_i - mean of the other G - 1)
    normalised  A_i = reward_scale * (r_i - mean of all G) / (std of all G + STD_FLOOR)

Centred advantages leave `reward_scale` what it is elsewhere, lambda of the tilt exp(lambda * r): the mean of
the others is independent of sample i, so that subtracting it biases nothing. Normalised ones are those of
GRPO (arXiv 2402.03300, section 4.1) and of published code: every prompt weighs the same, and for large G the
tilt is exp(reward_scale * r / std of the prompt's rewards under the current policy), which sharpens as that
shrinks. With small G mean and std are those of the group itself and it is no such tilt: with G = 2 advantages
are +-reward_scale whatever the rewards, so that only the order of two samples counts. Use G >= SMALL_GROUP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from am_diffusers.system.failures import phase, require_finite
from am_diffusers.terminal_cost import RewardOfLatents

STD_FLOOR = 1e-4
"""Added to the deviation of a prompt's rewards, as in the published code: equal rewards have no advantage."""
SMALL_GROUP = 8
"""Samples of a prompt below which normalised advantages are far from (r - mean) / std of the policy's law."""
LEAST_WEIGHT = 0.01
"""Weight that every sample of a group has at least: a smaller one changes a mean by less."""
Kind = Literal["centred", "normalised"]


@torch.no_grad()
def reward_values(
    reward_of_latents: RewardOfLatents,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    batch_size: int | None = None,
) -> Tensor:
    """Rewards of final latents (B, ...), without gradient, in their dtype and on their device, (B,).

    Args:
        reward_of_latents: `(latents (b, ...), prompts) -> (b,)`, higher is better.
        latents: final latents, (B, ...).
        prompts: B prompts.
        batch_size: samples scored at once; all by default.

    Raises:
        ValueError: if the reward is not one number per sample.
        PhaseMemoryError: if memory runs out.
        NonFiniteError: if a reward is not finite; names the prompts.
    """
    values = []
    for rows in torch.arange(len(latents)).split(batch_size or len(latents)):
        part = [prompts[int(i)] for i in rows]
        with phase("reward", len(rows)):
            rewards = reward_of_latents(latents[rows], part)
        if rewards.shape != (len(rows),):
            raise ValueError(f"expected a reward per sample, ({len(rows)},), got {tuple(rewards.shape)}")
        require_finite("reward", rewards, part)
        values.append(rewards.to(latents))
    return torch.cat(values)


@dataclass(frozen=True)
class Advantages:
    """Rewards of B samples to their advantages.

    Attributes:
        reward_scale: lambda, > 0.
        samples_per_prompt: the number G of neighbouring samples that share a prompt, at least 2.
        kind: `centred` or `normalised`, see the module docstring.

    Raises:
        ValueError: if a setting is out of range.
    """

    reward_scale: float
    samples_per_prompt: int
    kind: Kind = "centred"

    def __post_init__(self) -> None:
        if self.reward_scale <= 0:
            raise ValueError(
                f"reward_scale must be > 0 (rewards are higher-is-better), got {self.reward_scale}"
            )
        _check_group(self.samples_per_prompt)
        if self.kind not in ("centred", "normalised"):
            raise ValueError(f"advantages must be centred or normalised, got {self.kind!r}")

    def __call__(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """Advantages of `rewards` (B,), whose neighbours in groups of G share a prompt, (B,).

        Raises:
            ValueError: if B is no multiple of G, or the prompts of a group differ.
        """
        size = self.samples_per_prompt
        grouped = _grouped(rewards, prompts, size)
        offsets = grouped - grouped.mean(1, keepdim=True)
        if self.kind == "centred":
            offsets = offsets * (size / (size - 1))
        else:
            offsets = offsets / (grouped.std(1, correction=0, keepdim=True) + STD_FLOOR)
        return self.reward_scale * offsets.flatten()


def group_weights(exponents: Tensor, prompts: Sequence[str], size: int) -> Tensor:
    """Weights exp(exponent) over the mean of those of the group, at least `LEAST_WEIGHT`, (B,).

    Args:
        exponents: logarithms of the weights up to a constant of each prompt, (B,).
        prompts: B prompts, those of `size` neighbours the same.
        size: samples of a group, at least 2.

    Raises:
        ValueError: if `size` is less than 2, B no multiple of it, or the prompts of a group differ.
    """
    _check_group(size)
    shares = _grouped(exponents, prompts, size).softmax(1)
    return (size * shares).clamp(min=LEAST_WEIGHT).flatten()


def _check_group(size: int) -> None:
    if size < 2:
        raise ValueError(
            f"this method compares samples of a prompt: set samples_per_prompt to 2 or more, got {size}"
        )


def _grouped(values: Tensor, prompts: Sequence[str], size: int) -> Tensor:
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    if len(values) % size or any(len(set(group)) > 1 for group in groups):
        raise ValueError(
            f"expected groups of {size} neighbouring samples that share a prompt, got {list(prompts)}"
        )
    return values.reshape(-1, size)


def few_for_normalised(kind: Kind, group: int) -> list[str]:
    """Return a caution if a prompt has too few samples for normalised advantages."""
    if kind != "normalised" or group >= SMALL_GROUP:
        return []
    extreme = " (with 2 every advantage is +-reward_scale, whatever the rewards)" if group == 2 else ""
    return [
        f"--advantages normalised divides by the deviation of samples_per_prompt = {group} rewards, "
        f"which for so few is no tilt by reward / deviation{extreme}: set --samples_per_prompt "
        f"{SMALL_GROUP} or more, or --advantages centred"
    ]
