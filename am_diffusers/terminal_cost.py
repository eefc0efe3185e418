"""The start of the adjoint: rewards of final latents, their gradients, and what becomes of those.

    adjoint_K = -reward_scale * slope * clip(grad reward(x_K))

slope is 1 unless a `Tilt` aims at another law than the KL one. Smoothing replaces the reward by its mean
over noisy copies, so that the tilt is by a local mean; clipping shortens the longest gradients, which are
then the gradients of no reward: both are departures from the tilted law, and off by default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_diffusers.adjoint import terminal_adjoint
from am_diffusers.divergences import Tilt
from am_diffusers.system.failures import phase, require_finite

TINY = torch.finfo(torch.float32).tiny
RewardOfLatents = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class GradientOptions:
    """Options of a reward's gradient.

    Attributes:
        batch_size: samples decoded and differentiated at once; None = all.
        smoothing_std: standard deviation of noise added to the latents, in latent units; 0 = off.
        smoothing_samples: noisy copies averaged over, in opposite pairs: an even number.
        clip_quantile: gradients longer than a running quantile of the norms are shortened to it, in (0, 1);
            None = off.
        clip_decay: decay of the running quantile, in [0, 1).

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int | None = None
    smoothing_std: float = 0.0
    smoothing_samples: int = 4
    clip_quantile: float | None = None
    clip_decay: float = 0.9

    def __post_init__(self) -> None:
        if self.smoothing_std < 0 or self.smoothing_samples < 2 or self.smoothing_samples % 2:
            raise ValueError(
                "expected smoothing_std >= 0 and an even number of smoothing_samples, got "
                f"{self.smoothing_std} and {self.smoothing_samples}"
            )
        if self.clip_quantile is not None and not (0 < self.clip_quantile < 1 and 0 <= self.clip_decay < 1):
            raise ValueError(
                "need 0 < clip_quantile < 1 and 0 <= clip_decay < 1, got "
                f"{self.clip_quantile} and {self.clip_decay}"
            )


PLAIN = GradientOptions()


@dataclass(frozen=True, eq=False)
class Terminal:
    """The start of the adjoint sweep of a chunk of B samples.

    Attributes:
        rewards: (B,), means over the noisy copies if smoothed.
        adjoint: adjoint_K, (B, ...).
        gradient_norms: norms of the rewards' gradients before clipping, (B,).
        slopes: factor of the gradient relative to reward_scale, (B,).
    """

    rewards: Tensor
    adjoint: Tensor
    gradient_norms: Tensor
    slopes: Tensor


class TerminalCost:
    """Final latents to the start of the adjoint.

    Args:
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`, higher is better; the reward of a
            sample depends on that sample alone.
        reward_scale: lambda of the tilt exp(lambda * reward).
        options: how gradients are taken.
        tilt: the law aimed at if it isn't that one.

    Attributes:
        clip_norm: gradient norm above which gradients are shortened; None before the first `update`.
    """

    def __init__(
        self, reward: RewardOfLatents, reward_scale: float, options: GradientOptions, tilt: Tilt | None = None
    ) -> None:
        self.reward, self.reward_scale, self.options, self.tilt = reward, reward_scale, options, tilt
        self.clip_norm: float | None = None

    def __call__(self, final: Tensor, prompts: Sequence[str], noise: Callable[[], Tensor]) -> Terminal:
        """Rewards and adjoint_K of `final` (B, ...); `noise` draws standard normals like it, for smoothing.

        Raises:
            ValueError: if the reward is not differentiable or not one number per sample.
            NonFiniteError: if a reward or gradient is not finite; names the prompts.
        """
        rewards, gradient = self._smoothed(final, prompts, noise)
        norms = gradient.flatten(1).norm(dim=1)
        slopes = torch.ones_like(rewards) if self.tilt is None else self.tilt.slopes(rewards, prompts)
        factor = (
            slopes
            if self.clip_norm is None
            else slopes * (self.clip_norm / norms.clamp(min=TINY)).clamp(max=1)
        )
        gradient = gradient * factor.view(-1, *[1] * (gradient.ndim - 1))
        return Terminal(rewards, terminal_adjoint(gradient, self.reward_scale), norms, slopes)

    def update(self, gradient_norms: Tensor) -> None:
        """Move the clipping threshold by the norms of all samples of an iteration, of all ranks."""
        quantile, decay = self.options.clip_quantile, self.options.clip_decay
        if quantile is not None:
            new = torch.quantile(gradient_norms.double(), quantile).item()
            if new == 0:  # most gradients vanish: a threshold of 0 would stop all of them
                return
            self.clip_norm = new if self.clip_norm is None else decay * self.clip_norm + (1 - decay) * new

    def _smoothed(
        self, final: Tensor, prompts: Sequence[str], noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        size, std = self.options.batch_size, self.options.smoothing_std
        if std == 0:
            return reward_gradient(self.reward, final, prompts, batch_size=size)
        offsets = [std * noise() for _ in range(self.options.smoothing_samples // 2)]
        copies = [final + sign * offset for offset in offsets for sign in (1, -1)]
        results = [reward_gradient(self.reward, copy, prompts, batch_size=size) for copy in copies]
        rewards, gradients = zip(*results, strict=True)
        return torch.stack(rewards).mean(0), torch.stack(gradients).mean(0)


def reward_gradient(
    reward_of_latents: RewardOfLatents,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards (B,) and their gradients (B, ...) with respect to the latents, detached, in their dtype.

    Args:
        reward_of_latents: see `TerminalCost`.
        latents: final latents, (B, ...).
        prompts: B prompts.
        batch_size: samples differentiated at once; all by default.

    Raises:
        ValueError: if the reward is not differentiable or not one number per sample.
        PhaseMemoryError: if memory runs out.
        NonFiniteError: if a reward or gradient is not finite; names the prompts.
    """
    chunks = []
    for rows in torch.arange(len(latents)).split(batch_size or len(latents)):
        chunk_prompts = [prompts[int(i)] for i in rows]
        with phase("reward", len(rows)), torch.enable_grad():
            x = latents[rows].detach().requires_grad_(True)
            rewards = reward_of_latents(x, chunk_prompts)
        if rewards.shape != (len(rows),) or not rewards.requires_grad:
            raise ValueError(
                f"expected a differentiable reward per sample, ({len(rows)},), got {tuple(rewards.shape)} "
                f"with requires_grad={rewards.requires_grad}; use a reward with `differentiable = True`"
            )
        with phase("reward", len(rows)):
            (gradient,) = torch.autograd.grad(rewards, x, torch.ones_like(rewards))
        require_finite("reward", rewards, chunk_prompts)
        require_finite("reward gradient", gradient, chunk_prompts)
        chunks.append((rewards.detach().to(latents.dtype), gradient))
    return torch.cat([r for r, _ in chunks]), torch.cat([g for _, g in chunks])
