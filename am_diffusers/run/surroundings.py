"""What several methods are built with: rewards of latents, their gradients, the law aimed at."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.config import Config
from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.evaluation.base_rewards import (
    BASE_REWARDS_FILE,
    base_rewards,
    load_base_rewards,
    save_base_rewards,
)
from am_diffusers.methods.parts.advantages import Advantages
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import guided, latent_spec, make_sampler, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes
from am_diffusers.terminal_cost import GradientOptions, RewardOfLatents
from am_diffusers.transitions import TRANSITIONS, Transitions, jitter_sigmas
from am_diffusers.velocity import VelocityField


def reward_of_latents(model: Model, reward: Reward) -> RewardOfLatents:
    """The reward of decoded latents."""

    def scored(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return reward(model.decode(latents), prompts)

    return scored


class Fields(NamedTuple):
    """Whose velocities a method takes: guided ones where `guidance_mode` says so.

    Attributes:
        policy: trained.
        base: it is matched to.
        rollout: followed by trajectories; None = the policy.
    """

    policy: VelocityField
    base: VelocityField
    rollout: VelocityField | None


def make_fields(config: Config, model: Model) -> Fields:
    """The fields of a training iteration."""
    scale = config.method.rollout_guidance_scale
    if config.method.guidance_mode == "everywhere":
        return Fields(guided(model.policy, scale), guided(model.base, scale), None)
    return Fields(model.policy, model.base, None if scale == 1 else guided(model.policy, scale))


def stochastic_table(config: Config, model: Model) -> Transitions | Callable[[torch.Generator], Transitions]:
    """The table of a stochastic rollout, or a function of the shared generator that jitters its grid."""
    options = config.method
    shape = latent_spec(config, model).shape
    table, sigmas = TRANSITIONS[options.transitions], model.sde_sigmas(options.num_inference_steps, shape)

    def jittered(shared: torch.Generator) -> Transitions:
        return table(jitter_sigmas(sigmas, options.sigma_jitter, shared))

    return jittered if options.sigma_jitter else table(sigmas)


def end_point_table(config: Config, model: Model) -> Transitions:
    """What pictures are made with where any sampler will do."""
    steps, name = config.method.num_inference_steps, config.baselines.rollout_sampler
    shape = latent_spec(config, model).shape
    sigmas = (model.ode_sigmas if name == "ode_euler" else model.sde_sigmas)(steps, shape)
    return TRANSITIONS[name](sigmas)


def advantages(config: Config) -> Advantages:
    """How rewards of a prompt's samples are compared."""
    method = config.method
    return Advantages(method.reward_scale, method.samples_per_prompt, config.baselines.advantages)


def gradient_options(config: Config) -> GradientOptions:
    """How the reward's gradient is taken."""
    return GradientOptions(
        batch_size=micro_batch(config.optimizer.reward_micro_batch_size),
        smoothing_std=config.terminal.reward_smoothing_std,
        smoothing_samples=config.terminal.reward_smoothing_samples,
        clip_quantile=config.terminal.reward_clip_quantile,
    )


def make_tilt(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Tilt | None:
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
