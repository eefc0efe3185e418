"""ReFL (Xu et al., ImageReward, arXiv 2304.05977, section 3, algorithm 1): a late clean estimate is rewarded.

An iteration draws one late step k, the same for all samples, rolls out to x_k without gradient, and takes

    loss = mean of -reward_scale * reward(x_k - sigma_k * velocity_policy(x_k))

through that single call. Published: 40 steps, k among the last 10, that is the last quarter: earlier
estimates are too blurred to score. `last_steps` is how many last steps k is drawn from.

Bias: as DRaFT there is no tilted law as its optimum, and the gradient is that of the reward of an estimate,
not of a picture; at the last step it equals DRaFT-1's. Deviations: the paper maps rewards by
max(0, 2 - reward) for its own scorer, weighs them by .001 and adds the pretraining loss on captioned
pictures; here the reward enters as it is, and there are no training pictures to add.
Passes a sample: k calls of the policy, and one with a backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.parts.tails import Tails, TailSettings, collect_tails, steps_of, tail_loss
from am_diffusers.noise import LatentSpec
from am_diffusers.terminal_cost import RewardOfLatents
from am_diffusers.transitions import Transitions, ode_euler
from am_diffusers.velocity import Conditioning, VelocityField


class ReFL(Method[Tails]):
    """ReFL with any table, deterministic or not.

    Args:
        policy: field that is trained and followed, for instance a `GuidedField`.
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`, higher is better.
        transitions: table of the K steps.
        last_steps: number of last steps of which one is drawn each iteration, 1 .. K; see `last_quarter`.
        latents: shape, device and dtype of the latents.
        settings: reward scale and batch size.
        gather: concatenates a 1-D tensor over ranks; a single process by default.

    Raises:
        ValueError: if there aren't so many steps.
    """

    needs_reward_gradient = True
    aims_at_tilt = False

    def __init__(
        self,
        policy: VelocityField,
        reward: RewardOfLatents,
        transitions: Transitions,
        *,
        last_steps: int,
        latents: LatentSpec,
        settings: TailSettings,
        gather: Gather = gather_from_one,
    ) -> None:
        if not 1 <= last_steps <= transitions.num_steps:
            raise ValueError(
                f"last steps to draw from: expected 1 .. {transitions.num_steps}, those of the rollout, "
                f"got {last_steps}"
            )
        self.policy, self.reward, self.transitions = policy, reward, transitions
        self.last_steps, self.latents, self.settings, self.gather = last_steps, latents, settings, gather

    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[Tails]:
        """States at the drawn step, see `Method.collect`; without rewards, which the loss finds."""
        table = self.transitions
        k = table.num_steps - 1 - int(torch.randint(self.last_steps, (), generator=shared))
        clean = table.sigmas.new_tensor([table.sigmas[k], 0])
        return collect_tails(
            self.policy,
            steps_of(table, 0, k),
            ode_euler(clean),  # one step to sigma = 0 is the clean estimate
            cond,
            generators,
            latents=self.latents,
            batch_size=self.settings.collect_batch_size,
            gather=self.gather,
        )

    def loss(self, example: Tails) -> tuple[Tensor, dict[str, float]]:
        """Share of the loss that these samples contribute, see `tails.tail_loss`."""
        return tail_loss(self.policy, self.reward, self.settings, example)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all there is are the weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def last_quarter(num_steps: int) -> int:
    """Number of steps in the last quarter of K = `num_steps`, rounded up: 10 of 40, as published."""
    return -(-num_steps // 4)
