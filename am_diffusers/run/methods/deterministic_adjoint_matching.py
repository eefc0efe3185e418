"""Config to deterministic Adjoint Matching."""

import logging

import torch

from am_diffusers.methods import Method
from am_diffusers.methods.deterministic_adjoint_matching import (
    LABEL,
    DeterministicAdjointMatching,
    DeterministicSettings,
)
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import guided, latent_spec, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import gradient_options, make_tilt, reward_of_latents
from am_diffusers.system.processes import Processes
from am_diffusers.transitions import Transitions, jitter_sigmas, ode_euler

logger = logging.getLogger(__name__)


def deterministic_adjoint_matching(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """Deterministic Adjoint Matching of a model on a reward of its decoded pictures; says what it isn't."""
    config = plan.config
    options, scale = config.method, config.method.rollout_guidance_scale
    processes.on_main(lambda: logger.warning("%s", LABEL))
    latents = latent_spec(config, model)
    sigmas = model.ode_sigmas(options.num_inference_steps, latents.shape)

    def jittered(shared: torch.Generator) -> Transitions:
        return ode_euler(jitter_sigmas(sigmas, options.sigma_jitter, shared))

    return DeterministicAdjointMatching(
        model.policy,
        model.base,
        reward_of_latents(model, reward),
        jittered if options.sigma_jitter else ode_euler(sigmas),
        latents=latents,
        settings=DeterministicSettings(
            reward_scale=options.reward_scale,
            steps=config.deterministic.truncate_steps,
            cost_power=config.deterministic.cost_power,
            mask_quantile=options.mask_quantile,
            collect_batch_size=micro_batch(config.optimizer.rollout_micro_batch_size),
            offload=config.optimizer.offload_trajectories,
            gradient=gradient_options(config),
            tilt=make_tilt(plan, model, reward, processes),
        ),
        rollout_policy=None if scale == 1 else guided(model.policy, scale),
        gather=processes.gather,
    )
