"""Config to method: what is trained, towards which law."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from am_diffusers.base_rewards import base_rewards, save_base_rewards
from am_diffusers.config import Config
from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.load import latent_spec, make_sampler
from am_diffusers.methods import Method
from am_diffusers.methods.adjoint_matching import AdjointMatching, AdjointMatchingSettings
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import Plan
from am_diffusers.rewards import Reward
from am_diffusers.terminal import GradientOptions
from am_diffusers.transitions import TRANSITIONS, Transitions, jitter_sigmas
from am_diffusers.velocity import GuidedField


def adjoint_matching(plan: Plan, model: SD3, reward: Reward, accelerator: Accelerator) -> Method:
    """Adjoint Matching of a model on a reward of its decoded pictures."""
    config = plan.config
    options = config.method
    table, sigmas = TRANSITIONS[options.transitions], model.sde_sigmas(options.num_inference_steps)

    def jittered(shared: torch.Generator) -> Transitions:
        return table(jitter_sigmas(sigmas, options.sigma_jitter, shared))

    def reward_of_latents(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return reward(model.decode(latents), prompts)

    def gather(values: Tensor) -> Tensor:
        return accelerator.gather(values)  # pyright: ignore[reportReturnType]

    scale = options.rollout_guidance_scale
    return AdjointMatching(
        model.policy,
        model.base,
        reward_of_latents,
        jittered if options.sigma_jitter else table(sigmas),
        latents=latent_spec(config, model),
        settings=AdjointMatchingSettings(
            reward_scale=options.reward_scale,
            pairing=options.pairing,
            adjoint=options.adjoint,
            steps=options.loss_steps,
            mask_quantile=options.mask_quantile,
            collect_batch_size=config.optimizer.rollout_micro_batch_size,
            gradient=gradient_options(config),
            tilt=make_tilt(plan, model, reward, accelerator),
        ),
        rollout_policy=None if scale == 1 else GuidedField(model.policy, scale),
        gather=gather,
    )


METHOD_BUILDERS: dict[str, Callable[[Plan, SD3, Reward, Accelerator], Method]] = {
    "adjoint_matching": adjoint_matching,
}


def gradient_options(config: Config) -> GradientOptions:
    """How the reward's gradient is taken."""
    return GradientOptions(
        batch_size=config.optimizer.reward_micro_batch_size,
        smoothing_std=config.terminal.reward_smoothing_std,
        smoothing_samples=config.terminal.reward_smoothing_samples,
        clip_quantile=config.terminal.reward_clip_quantile,
    )


def make_tilt(plan: Plan, model: SD3, reward: Reward, accelerator: Accelerator) -> Tilt | None:
    """The law of a divergence other than kl, its normalisers estimated on base pictures."""
    config, options = plan.config, plan.config.terminal
    if options.divergence == "kl":
        return None
    prompts = plan.some_train_prompts(options.divergence_prompts, "divergence")
    sampler = make_sampler(config, model, purpose="divergence")
    scores = base_rewards(
        sampler, model.base, [reward], prompts, options.divergence_samples, accelerator=accelerator
    )
    if accelerator.is_main_process:
        save_base_rewards(Path(config.run.output_dir) / "base_rewards.json", prompts, scores)
    return Tilt.estimate(
        Divergence(options.divergence, options.divergence_q),
        config.method.reward_scale,
        dict(zip(prompts, scores[reward.name], strict=True)),
        per_prompt=len(prompts) == len(plan.used_train_prompts()),
        max_slope=options.divergence_max_slope,
    )
