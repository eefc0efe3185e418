"""Config to Adjoint Matching."""

from am_diffusers.methods.adjoint_matching import AdjointMatching, AdjointMatchingSettings
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import latent_spec, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import (
    gradient_options,
    make_fields,
    make_tilt,
    reward_of_latents,
    stochastic_table,
)
from am_diffusers.system.processes import Processes


def adjoint_matching(plan: Plan, model: Model, reward: Reward, processes: Processes) -> AdjointMatching:
    """Adjoint Matching of a model on a reward of its decoded pictures."""
    config = plan.config
    options = config.method
    fields = make_fields(config, model)
    return AdjointMatching(
        fields.policy,
        fields.base,
        reward_of_latents(model, reward),
        stochastic_table(config, model),
        latents=latent_spec(config, model),
        settings=AdjointMatchingSettings(
            reward_scale=options.reward_scale,
            pairing=options.pairing,
            adjoint=options.adjoint,
            steps=options.loss_steps,
            step_selection=options.step_selection,
            mask_quantile=options.mask_quantile,
            collect_batch_size=micro_batch(config.optimizer.rollout_micro_batch_size),
            offload=config.optimizer.offload_trajectories,
            gradient=gradient_options(config),
            tilt=make_tilt(plan, model, reward, processes),
        ),
        rollout_policy=fields.rollout,
        gather=processes.gather,
    )
