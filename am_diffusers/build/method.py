"""Config to method: what is trained, towards which law."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from am_diffusers.base_rewards import BASE_REWARDS_FILE, base_rewards, load_base_rewards, save_base_rewards
from am_diffusers.config import Config
from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.load import latent_spec, make_sampler, micro_batch
from am_diffusers.methods import Method
from am_diffusers.methods.adjoint_matching import AdjointMatching, AdjointMatchingSettings
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import Plan
from am_diffusers.processes import Processes
from am_diffusers.rewards import Reward
from am_diffusers.terminal import GradientOptions
from am_diffusers.transitions import TRANSITIONS, Transitions, jitter_sigmas
from am_diffusers.velocity import GuidedField


def adjoint_matching(plan: Plan, model: SD3, reward: Reward, processes: Processes) -> Method:
    """Adjoint Matching of a model on a reward of its decoded pictures."""
    config = plan.config
    options = config.method
    table, sigmas = TRANSITIONS[options.transitions], model.sde_sigmas(options.num_inference_steps)

    def jittered(shared: torch.Generator) -> Transitions:
        return table(jitter_sigmas(sigmas, options.sigma_jitter, shared))

    def reward_of_latents(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return reward(model.decode(latents), prompts)

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
            collect_batch_size=micro_batch(config.optimizer.rollout_micro_batch_size),
            offload=config.optimizer.offload_trajectories,
            gradient=gradient_options(config),
            tilt=make_tilt(plan, model, reward, processes),
        ),
        rollout_policy=None if scale == 1 else GuidedField(model.policy, scale),
        gather=processes.gather,
    )


METHOD_BUILDERS: dict[str, Callable[[Plan, SD3, Reward, Processes], Method]] = {
    "adjoint_matching": adjoint_matching,
}


def gradient_options(config: Config) -> GradientOptions:
    """How the reward's gradient is taken."""
    return GradientOptions(
        batch_size=micro_batch(config.optimizer.reward_micro_batch_size),
        smoothing_std=config.terminal.reward_smoothing_std,
        smoothing_samples=config.terminal.reward_smoothing_samples,
        clip_quantile=config.terminal.reward_clip_quantile,
    )


def make_tilt(plan: Plan, model: SD3, reward: Reward, processes: Processes) -> Tilt | None:
    """The law of a divergence other than kl, its normalisers estimated on base pictures."""
    config, options = plan.config, plan.config.terminal
    if options.divergence == "kl":
        return None
    prompts = plan.some_train_prompts(options.divergence_prompts, "divergence")
    file = Path(config.run.output_dir) / BASE_REWARDS_FILE
    if file.exists():  # of the run that goes on; a fresh start removed it
        scores = load_base_rewards(file, prompts)
    else:
        sampler = make_sampler(config, model, purpose="divergence")
        number = options.divergence_samples
        with processes.together():
            scores = base_rewards(
                sampler, model.base, [reward], prompts, number, accelerator=processes.accelerator
            )
        processes.on_main(lambda: save_base_rewards(file, prompts, scores))
    return Tilt.estimate(
        Divergence(options.divergence, options.divergence_q),
        config.method.reward_scale,
        dict(zip(prompts, scores[reward.name], strict=True)),
        per_prompt=len(prompts) == len(plan.used_train_prompts()),
        max_slope=options.divergence_max_slope,
    )
