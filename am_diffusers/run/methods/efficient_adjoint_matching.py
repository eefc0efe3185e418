"""Config to Efficient Adjoint Matching."""

from am_diffusers.methods import Method
from am_diffusers.methods.efficient_adjoint_matching import EfficientAdjointMatching, EfficientSettings
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import guided, latent_spec, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import gradient_options, make_tilt, reward_of_latents
from am_diffusers.system.processes import Processes


def efficient_adjoint_matching(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """Efficient Adjoint Matching of a model on a reward of its decoded pictures."""
    config = plan.config
    options, latents = config.efficient, latent_spec(config, model)
    return EfficientAdjointMatching(
        model.policy,
        model.base,
        reward_of_latents(model, reward),
        model.ode_sigmas(options.eam_ode_steps, latents.shape),
        latents=latents,
        settings=EfficientSettings(
            reward_scale=config.method.reward_scale,
            variance=options.eam_c,
            score=options.eam_score,
            sigma=options.eam_sigma,
            rows=options.eam_rows,
            max_weight=options.eam_max_weight,
            collect_batch_size=micro_batch(config.optimizer.rollout_micro_batch_size),
            offload=config.optimizer.offload_trajectories,
            gradient=gradient_options(config),
            tilt=make_tilt(plan, model, reward, processes),
        ),
        rollout_policy=guided(model.policy, config.method.rollout_guidance_scale),
        gather=processes.gather,
    )
