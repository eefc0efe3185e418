"""Config to Flow-GRPO."""

from am_diffusers.methods import Method
from am_diffusers.methods.flow_grpo import FlowGRPO, FlowGRPOSettings
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import guided, latent_spec, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import advantages, reward_of_latents, stochastic_table
from am_diffusers.system.processes import Processes


def flow_grpo(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """Flow-GRPO of a model on a reward of its decoded pictures."""
    config, options = plan.config, plan.config.baselines
    scale = config.method.rollout_guidance_scale
    return FlowGRPO(
        guided(model.policy, scale),
        guided(model.base, scale),
        reward_of_latents(model, reward),
        stochastic_table(config, model),
        latents=latent_spec(config, model),
        settings=FlowGRPOSettings(
            advantages(config),
            passes=options.grpo_passes,
            clip_range=options.grpo_clip_range,
            kl_weight=options.grpo_kl_weight,
            steps=config.method.loss_steps,
            collect_batch_size=micro_batch(config.optimizer.rollout_micro_batch_size),
            reward_batch_size=micro_batch(config.optimizer.reward_micro_batch_size),
        ),
        gather=processes.gather,
    )
