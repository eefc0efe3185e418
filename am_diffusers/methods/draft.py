"""DRaFT-K (Clark et al., arXiv 2309.17400): the reward's gradient through the last K' steps of the rollout.

    loss = mean of -reward_scale * reward(x_K),   x_K differentiable in the last `steps` = K' steps

K' = K is DRaFT, the exact gradient of the sampler's reward; fewer steps cost less memory and are biased, yet
the paper finds few steps, even one, to learn faster. Algorithm: roll out without gradient to step K - K',
then with gradient to the end, through decoding and reward. Activations of K' steps are held at once, those of
decoding and reward for a few samples at a time (tails.py); `gradient_checkpointing` is what the paper uses.

Bias: nothing holds the policy to the base (no KL term, as published), so that it has no tilted law as its
optimum but the pictures of highest reward: `reward_scale` doesn't set how far it goes, the number of
iterations does. Deviations: the low-variance DRaFT-LV (several noises at the last step) is not offered.
Passes a sample: K - K' calls of the policy, and K' with a backward pass each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.parts.tails import Tails, TailSettings, collect_tails, steps_of, tail_loss
from am_diffusers.noise import LatentSpec
from am_diffusers.terminal_cost import RewardOfLatents
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


class DRaFT(Method[Tails]):
    """DRaFT-K with any table, deterministic or not.

    Args:
        policy: field that is trained and followed, for instance a `GuidedField`.
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`, higher is better.
        transitions: table of the K steps.
        steps: the number K' of last steps that are differentiated, 1 .. K.
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
        steps: int,
        latents: LatentSpec,
        settings: TailSettings,
        gather: Gather = gather_from_one,
    ) -> None:
        if not 1 <= steps <= transitions.num_steps:
            raise ValueError(
                f"steps to differentiate: expected 1 .. {transitions.num_steps}, those of the rollout, "
                f"got {steps}"
            )
        first = transitions.num_steps - steps
        self.head = steps_of(transitions, 0, first)
        self.tail = steps_of(transitions, first, transitions.num_steps)
        self.policy, self.reward, self.latents = policy, reward, latents
        self.settings, self.gather = settings, gather

    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[Tails]:
        """States K' steps before the end, see `Method.collect`; without rewards, which the loss finds."""
        return collect_tails(
            self.policy,
            self.head,
            self.tail,
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
