"""DRaFT-K (Clark et al., arXiv 2309.17400): the reward's gradient through the last K' steps of the rollout.

    loss = mean of -reward_scale * reward(x_K),   x_K differentiable in the last `draft_steps` = K' steps

K' = K is DRaFT, the exact gradient of the sampler's reward; fewer steps cost less memory and are biased, yet
the paper finds few steps, even one, to learn faster. Activations of K' steps are held at once, those of
decoding and reward for a few samples at a time (tails.py); `gradient_checkpointing` is what the paper uses.
Nothing holds the policy to the base (no KL term, as published): its optimum is no tilted law but the images
of highest reward, and the number of iterations decides how far it goes (docs/theory.md, section 9). DRaFT-LV
(several noises at the last step) is not offered. Passes a sample: K - K' policy calls, and K' with a
backward pass each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from am_diffusers.methods.base import Collected
from am_diffusers.methods.parts.end_points import EndPointSettings
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.methods.parts.tails import TailMethod, Tails, steps_of
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class DRaFTSettings(EndPointSettings):
    """`method: draft`.

    Attributes:
        draft_steps: last steps that DRaFT differentiates, 1 to num_inference_steps; memory grows with it.
    """

    draft_steps: int = 1

    def __post_init__(self) -> None:
        require(self, [(self.draft_steps >= 1, "draft_steps", "from 1 to num_inference_steps")])


class DRaFT(TailMethod):
    """DRaFT-K with any table, deterministic or not.

    Raises:
        ValueError: if there are fewer steps than are to be differentiated.
    """

    title, paper = "DRaFT", "2309.17400"
    Settings = DRaFTSettings
    own: DRaFTSettings

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        total, steps = self.table.num_steps, self.own.draft_steps
        if steps > total:
            raise ValueError(f"--draft_steps must be from 1 to num_inference_steps, {total}, got {steps}")
        self.head = steps_of(self.table, 0, total - steps)
        self.tail = steps_of(self.table, total - steps, total)

    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[Tails]:
        """Return states K' steps before the end, see `Method.collect`; the loss finds the rewards."""
        return self.collect_tails(self.head, self.tail, cond, generators)
