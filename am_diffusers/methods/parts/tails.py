"""The end of a rollout with gradients on: what DRaFT and ReFL train, and the loss they share.

    x_first: the policy's state after the first steps, no gradient
    x_K = steps first .. K-1 of the policy from x_first, differentiable in its parameters
    loss = mean over samples of -reward_scale * reward(x_K)

The gradient goes through decoding and reward first, some samples at a time, and then through the steps, as

    grad loss = sum over samples of (d x_K / d parameters)^T (-reward_scale * weight * grad reward(x_K)).

So what is held at once is the graph of these steps for the samples of a micro-batch of the loss, which grows
with their number, and that of decoding and reward for `reward_batch_size` of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from am_diffusers.adjoint import terminal_adjoint
from am_diffusers.methods.base import Collected, Gather
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import noise_level, sample
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import RewardOfLatents, reward_gradient
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True, eq=False)
class Tails:
    """Ends of rollouts, one row a sample.

    Attributes:
        latents: states the ends start from, (N, ...).
        step_noise: noise of the first S steps of `table`, those that add any, (N, S, ...).
        weight: factors of the rewards in the loss, (N,).
        cond: conditioning of the N samples.
        table: the steps that are differentiated, the last of them to sigma = 0.

    Raises:
        ValueError: if the shapes disagree.
    """

    latents: Tensor
    step_noise: Tensor
    weight: Tensor
    cond: Conditioning
    table: Transitions

    def __post_init__(self) -> None:
        noisy = int((self.table.std > 0).sum())
        expected = (len(self.cond), noisy, *self.latents.shape[1:])
        if self.step_noise.shape != expected or self.weight.shape != (len(self.cond),):
            raise ValueError(
                f"Tails: latents {tuple(self.latents.shape)}, expected step_noise {expected} and one weight "
                f"a row, got {tuple(self.step_noise.shape)} and {tuple(self.weight.shape)}"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def split(self, micro_batch_size: int) -> list["Tails"]:
        """Consecutive batches of at most `micro_batch_size` rows, which share this one's memory."""
        rows = [part.tolist() for part in torch.arange(len(self)).split(micro_batch_size)]
        parts = (t.split(micro_batch_size) for t in (self.latents, self.step_noise, self.weight))
        return [
            replace(self, latents=x, step_noise=noise, weight=weight, cond=self.cond.index(ids))
            for ids, x, noise, weight in zip(rows, *parts, strict=True)
        ]

    def describe(self) -> str:
        """Noise level, prompts and norms of the rows, for an error message."""
        norms = [round(norm, 3) for norm in self.latents.flatten(1).norm(dim=1).tolist()]
        prompts = sorted(set(self.cond.prompts))
        return f"ends from sigma {self.table.sigmas[0]:.4f}, prompts {prompts}, norms of latents {norms}"


@dataclass(frozen=True)
class TailSettings:
    """What the methods that differentiate the end of a rollout share.

    Attributes:
        reward_scale: factor of the reward in the loss, > 0. There is no term to weigh it against: with Adam
            it changes hardly anything but the clipping of gradients.
        collect_batch_size: samples rolled out at once, without gradient; all by default.
        reward_batch_size: samples decoded and differentiated at once; by default all of a micro-batch of the
            loss. The reward of a sample depends on that sample alone.

    Raises:
        ValueError: if a setting is out of range.
    """

    reward_scale: float
    collect_batch_size: int | None = None
    reward_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.reward_scale <= 0:
            raise ValueError(
                f"reward_scale must be > 0 (rewards are higher-is-better), got {self.reward_scale}"
            )


def steps_of(table: Transitions, start: int, stop: int) -> Transitions:
    """Steps `start` .. `stop` - 1 of a table."""
    part = slice(start, stop)
    return Transitions(
        table.sigmas[start : stop + 1], table.x_coef[part], table.v_coef[part], table.std[part]
    )


@torch.no_grad()
def collect_tails(
    policy: VelocityField,
    head: Transitions,
    tail: Transitions,
    cond: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    latents: LatentSpec,
    batch_size: int | None,
    gather: Gather,
) -> Collected[Tails]:
    """Roll the policy out over `head` from noise, and draw the noise of `tail`.

    Rewards are known once the loss has made the pictures: it logs them, and there are none here.

    Args:
        policy: field that is followed.
        head: steps without gradient; may be none.
        tail: the steps after them.
        cond: conditioning of the B samples of this rank.
        generators: one per sample.
        latents: shape, device and dtype of the latents.
        batch_size: samples rolled out at once; None = all.
        gather: concatenates a 1-D tensor over ranks.

    Raises:
        PhaseMemoryError: if memory runs out.
    """
    starts, noises, noisy = [], [], int((tail.std > 0).sum())
    for rows in torch.arange(len(cond)).split(batch_size or len(cond)):
        own = [generators[i] for i in rows.tolist()]
        noise = latents.draw(own)
        with phase("rollout", len(rows)):
            chunk = cond.index(rows.tolist())
            starts.append(sample(policy, head, chunk, noise, lambda _, own=own: latents.draw(own)))
        drawn = [latents.draw(own) for _ in range(noisy)]
        noises.append(torch.stack(drawn, 1) if drawn else noise.new_empty(len(rows), 0, *noise.shape[1:]))
    ones = torch.cat(starts).new_ones(len(cond))
    weight = ones / len(gather(ones))
    return Collected(Tails(torch.cat(starts), torch.cat(noises), weight, cond, tail), ones[:0], {})


def tail_loss(
    policy: VelocityField, reward: RewardOfLatents, settings: TailSettings, tails: Tails
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of -reward_scale * reward of the tails' ends, and that of the rewards to log.

    Its gradient is that sum's; the graph from the ends to the rewards is gone when it returns.

    Raises:
        ValueError: if the reward is not differentiable or not one number per sample.
        NonFiniteError: if a reward or its gradient is not finite; names the prompts.
        PhaseMemoryError: if memory runs out in decoding or reward.
    """
    x, table, cond = tails.latents, tails.table, tails.cond
    for k in range(table.num_steps):
        velocity = policy(x, noise_level(table, k, x), cond)
        noisy = table.std[k].item() > 0
        x = table.step(k, x, velocity, tails.step_noise[:, k]) if noisy else table.mean(k, x, velocity)
    size, scale, weight = settings.reward_batch_size, settings.reward_scale, tails.weight
    rewards, gradient = reward_gradient(reward, x.detach(), cond.prompts, batch_size=size)
    cotangent = terminal_adjoint(gradient, scale) * weight.view(-1, *[1] * (x.ndim - 1))
    cost = terminal_adjoint(rewards, scale)  # linear in its argument: of the rewards, their cost
    # The second term is 0 and has the gradient: d loss / d x_K is the cotangent.
    loss = (weight * cost).sum() + (cotangent * (x - x.detach())).sum()
    return loss, {"reward": (weight * rewards).sum().item()}
