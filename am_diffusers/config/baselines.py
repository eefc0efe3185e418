"""The methods that Adjoint Matching is compared with: RAM, DRaFT, ReFL, Flow-GRPO."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BaselinesConfig:
    """RAM, DRaFT, ReFL and Flow-GRPO; what they are: `am_diffusers.methods`.

    Attributes:
        rollout_sampler: how ram, draft and refl make pictures in training, in num_inference_steps steps: by
            the model's own ODE, or a stochastic table (see `am_diffusers.transitions`).
        advantages: centred subtracts the mean of a prompt's other rewards, which keeps reward_scale the
            factor of the tilt; normalised also divides by their standard deviation, as GRPO does. That is
            taken from samples_per_prompt rewards: with few it is no tilt by reward / deviation (with 2 every
            advantage is +-reward_scale, whatever the rewards): set 8 or more.
        ram_noises: noise levels that RAM puts each picture back to.
        draft_steps: last steps that DRaFT differentiates, 1 to num_inference_steps; memory grows with it.
        refl_last_steps: last steps of which ReFL draws one an iteration; null = the last quarter, as
            published.
        grpo_passes: iterations that Flow-GRPO trains on the steps of one rollout; the clip acts from the
            second on.
        grpo_clip_range: how far from 1 the likelihood ratio of a step counts, in (0, 1); a ratio of sums over
            all latent dimensions, so that PPO's .2 is right, not the 1e-4 of published averages.
        grpo_kl_weight: factor of the KL of each step against the base, 0 = none; with centred advantages
            the tilt by reward_scale / grpo_kl_weight is reached to first order (docs/theory.md).
    """

    rollout_sampler: Literal["ode_euler", "memoryless_local_linear", "memoryless_euler", "ancestral"] = (
        "ode_euler"
    )
    advantages: Literal["centred", "normalised"] = "centred"
    ram_noises: int = 4
    draft_steps: int = 1
    refl_last_steps: int | None = None
    grpo_passes: int = 1
    grpo_clip_range: float = 0.2
    grpo_kl_weight: float = 1.0
