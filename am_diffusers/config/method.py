"""The method and its rewards."""

from dataclasses import dataclass
from typing import Literal

from am_diffusers.config.rewards import RewardConfig


@dataclass(frozen=True)
class MethodConfig:
    """Method and rewards.

    Attributes:
        rewards: the trained rewards; their weighted sum is maximised.
        method: fine-tuning method, a key of `am_diffusers.methods.METHODS`.
        num_inference_steps: denoising steps K of a training rollout, at least 2.
        transitions: stochastic table of the rollout (see `am_diffusers.transitions`).
        pairing: which adjoint belongs to a step (MATH: right is the optimum of the discrete chain).
        adjoint: lean (base Jacobian only) or full (with the policy's Jacobian; for study, costs more).
        samples_per_prompt: neighbouring samples of an iteration that share a prompt; train_batch_size is a
            multiple of it on each process. Methods that compare samples of a prompt need 2 or more.
        reward_scale: factor lambda of the reward in exp(lambda * r), in 1 / reward units.
        loss_steps: denoising steps an iteration trains on: all, or a number, at most K - 1.
        step_selection: which ones, for a number: last_and_random (published: half of them the last ones with
            noise, the others at random), or unbiased for all of them: stratified, or pps (with a probability
            that follows each step's residual); flow_grpo draws all of them alike.
        mask_quantile: share in (0, 1) of the rows of a step to keep, those of largest residual are left
            out of the loss; null = keep all.
        sigma_jitter: share in [0, 0.5) of a step by which interior sigmas move at random each iteration.
        rollout_guidance_scale: classifier-free guidance of the training rollout; 1.0 = off.
        guidance_mode: where it acts: rollout (in the rollout alone: ungrounded, the tilted law is that of no
            sampler, found to work best in practice), none (needs scale 1: grounded), or everywhere (in the
            base's adjoint and the regression too: grounded on the guided base, adjoints grow with the scale).
    """

    rewards: list[RewardConfig]
    method: str = "adjoint_matching"
    num_inference_steps: int = 20
    transitions: Literal["memoryless_local_linear", "memoryless_euler", "ancestral"] = (
        "memoryless_local_linear"
    )
    pairing: Literal["right", "left", "trapezoid"] = "right"
    adjoint: Literal["lean", "full"] = "lean"
    samples_per_prompt: int = 1
    reward_scale: float = 1.0
    loss_steps: int | Literal["all"] = "all"
    step_selection: Literal["last_and_random", "stratified", "pps"] = "last_and_random"
    mask_quantile: float | None = 0.9
    sigma_jitter: float = 0.0
    rollout_guidance_scale: float = 1.0
    guidance_mode: Literal["rollout", "none", "everywhere"] = "rollout"
