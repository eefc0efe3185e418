"""The end of a rollout with gradients on, and the loss of the methods that train it alone.

    x_first: the policy's state after the first steps, no gradient
    x_K = steps first .. K-1 of the policy from x_first, differentiable in its parameters
    loss = mean over samples of -reward_scale * reward(x_K)

The gradient goes through decoding and reward first, some samples at a time, and then through the steps, as

    grad loss = sum over samples of (d x_K / d parameters)^T (-reward_scale * weight * grad reward(x_K)).

So what is held at once is the graph of these steps for the samples of a micro-batch of the loss, which grows
with their number, and that of decoding and reward for `Sizes.reward` of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from am_diffusers.adjoint import terminal_adjoint
from am_diffusers.methods.base import Collected, Method
from am_diffusers.methods.parts import laws
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.rollout import noise_level, sample
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import reward_gradient
from am_diffusers.transitions import Transitions, ode_euler
from am_diffusers.velocity import Conditioning

COLUMNS = ("x_coef", "v_coef", "std")


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


def steps_of(table: Transitions, start: int, stop: int) -> Transitions:
    """Steps `start` .. `stop` - 1 of a table."""
    part = slice(start, stop)
    return Transitions(
        table.sigmas[start : stop + 1], table.x_coef[part], table.v_coef[part], table.std[part]
    )


def with_ode_tail(table: Transitions, steps: int) -> Transitions:
    """Return a table whose last `steps` steps with noise are Euler's of the ODE instead."""
    if steps == 0:
        return table
    end, ode = table.num_steps, ode_euler(table.sigmas)
    head = slice(0, end - 1 - steps)
    tail = slice(end - 1 - steps, end)
    columns = (torch.cat([getattr(table, name)[head], getattr(ode, name)[tail]]) for name in COLUMNS)
    return Transitions(table.sigmas, *columns)


class TailMethod(Method[Tails]):
    """A method that differentiates the reward of the end of a rollout, and nothing but that.

    Attributes:
        table: table of the rollout's K steps.
    """

    reads = ("num_inference_steps",)
    needs_reward_gradient = True
    guided_everywhere = True

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        self.table = around.table(self.own.rollout_sampler, shared.num_inference_steps)

    @classmethod
    def law(cls, shared: SharedSettings, own: Any) -> str:
        """Return that there is none, see `Method.law`."""
        return laws.elsewhere(shared, laws.NO_LAW)

    @torch.no_grad()
    def collect_tails(
        self,
        head: Transitions,
        tail: Transitions,
        cond: Conditioning,
        generators: Sequence[torch.Generator],
    ) -> Collected[Tails]:
        """Roll the policy out over `head` from noise, and draw the noise of `tail`.

        Rewards are known once the loss has made the images: it logs them, and there are none here.

        Args:
            head: steps without gradient; may be none.
            tail: the steps after them.
            cond: conditioning of the B samples of this rank.
            generators: one per sample.

        Raises:
            PhaseMemoryError: if memory runs out.
        """
        starts, noises, noisy = [], [], int((tail.std > 0).sum())
        for rows in torch.arange(len(cond)).split(self.sizes.rollout or len(cond)):
            own = [generators[i] for i in rows.tolist()]
            noise = self.latents.draw(own)
            with phase("rollout", len(rows)):
                chunk = cond.index(rows.tolist())
                starts.append(
                    sample(self.policy, head, chunk, noise, lambda _, own=own: self.latents.draw(own))
                )
            drawn = [self.latents.draw(own) for _ in range(noisy)]
            noises.append(torch.stack(drawn, 1) if drawn else noise.new_empty(len(rows), 0, *noise.shape[1:]))
        ones = torch.cat(starts).new_ones(len(cond))
        weight = ones / len(self.gather(ones))
        return Collected(Tails(torch.cat(starts), torch.cat(noises), weight, cond, tail), ones[:0], {})

    def loss(self, example: Tails) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum of -reward_scale * reward of the ends, and that of the rewards.

        Its gradient is that sum's; the graph from the ends to the rewards is gone when it returns.

        Raises:
            ValueError: if the reward is not differentiable or not one number per sample.
            NonFiniteError: if a reward or its gradient is not finite; names the prompts.
            PhaseMemoryError: if memory runs out in decoding or reward.
        """
        x, table, cond = example.latents, example.table, example.cond
        for k in range(table.num_steps):
            velocity = self.policy(x, noise_level(table, k, x), cond)
            noisy = table.std[k].item() > 0
            x = table.step(k, x, velocity, example.step_noise[:, k]) if noisy else table.mean(k, x, velocity)
        scale, weight = self.shared.scale, example.weight
        rewards, gradient = reward_gradient(
            self.around.reward, x.detach(), cond.prompts, batch_size=self.sizes.reward
        )
        cotangent = terminal_adjoint(gradient, scale) * weight.view(-1, *[1] * (x.ndim - 1))
        cost = terminal_adjoint(rewards, scale)  # linear in its argument: of the rewards, their cost
        # The second term is 0 and has the gradient: d loss / d x_K is the cotangent.
        loss = (weight * cost).sum() + (cotangent * (x - x.detach())).sum()
        return loss, {"reward": (weight * rewards).sum().item()}
