"""ReFL (Xu et al., ImageReward, arXiv 2304.05977, section 3, algorithm 1): a late clean estimate is rewarded.

An iteration draws one late step k, the same for all samples, rolls out to x_k without gradient, and takes

    loss = mean of -reward_scale * reward(x_k - sigma_k * velocity_policy(x_k))

through that single call. Published: 40 steps, k among the last 10, that is the last quarter: earlier
estimates are too blurred to score. As DRaFT it has no tilted law as its optimum (docs/theory.md, section 9),
and the gradient is that of the reward of an estimate; at the last step it equals DRaFT-1's. Deviations: the
paper maps rewards by max(0, 2 - reward) for its own scorer, weighs them by .001 and adds the pretraining
loss on captioned images; here the reward enters as it is. Passes a sample: k policy calls, and one with a
backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from am_diffusers.methods.base import Collected
from am_diffusers.methods.parts.end_points import EndPointSettings
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.methods.parts.tails import TailMethod, Tails, steps_of
from am_diffusers.transitions import ode_euler
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class ReFLSettings(EndPointSettings):
    """`method: refl`.

    Attributes:
        refl_last_steps: last steps of which ReFL draws one an iteration; null = the last quarter, as
            published.
    """

    refl_last_steps: int | None = None

    def __post_init__(self) -> None:
        last = self.refl_last_steps
        rule = "from 1 to num_inference_steps, or null"
        require(self, [(last is None or last >= 1, "refl_last_steps", rule)])


class ReFL(TailMethod):
    """ReFL with any table, deterministic or not.

    Raises:
        ValueError: if there are fewer steps than one is drawn from.
    """

    title, paper = "ReFL", "2304.05977"
    Settings = ReFLSettings
    own: ReFLSettings

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        total = self.table.num_steps
        self.last_steps = self.own.refl_last_steps or -(-total // 4)  # 10 of 40, as published
        if self.last_steps > total:
            raise ValueError(
                f"--refl_last_steps must be from 1 to num_inference_steps, {total}, or null, got "
                f"{self.last_steps}"
            )

    @classmethod
    def dearest(cls, own: ReFLSettings) -> ReFLSettings:
        """Return flags with which every rollout takes all steps, the longest there is."""
        return replace(own, refl_last_steps=1)

    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[Tails]:
        """Return states at the drawn step, see `Method.collect`; the loss finds the rewards."""
        table = self.table
        k = table.num_steps - 1 - int(torch.randint(self.last_steps, (), generator=shared))
        clean = table.sigmas.new_tensor([table.sigmas[k], 0])
        # One step to sigma = 0 is the clean estimate.
        return self.collect_tails(steps_of(table, 0, k), ode_euler(clean), cond, generators)
