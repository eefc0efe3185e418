"""Config to RAM."""

from am_diffusers.methods import Method
from am_diffusers.methods.ram import RAM, RAMSettings
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import guided, latent_spec, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import advantages, end_point_table, reward_of_latents
from am_diffusers.system.processes import Processes


def ram(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """RAM of a model on a reward of its decoded pictures."""
    config = plan.config
    return RAM(
        model.policy,
        model.base,
        reward_of_latents(model, reward),
        end_point_table(config, model),
        latents=latent_spec(config, model),
        settings=RAMSettings(
            advantages(config),
            noises=config.baselines.ram_noises,
            collect_batch_size=micro_batch(config.optimizer.rollout_micro_batch_size),
            reward_batch_size=micro_batch(config.optimizer.reward_micro_batch_size),
        ),
        rollout_policy=guided(model.policy, config.method.rollout_guidance_scale),
        gather=processes.gather,
    )
