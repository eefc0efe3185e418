"""Config to DRaFT and ReFL."""

from am_diffusers.config import Config
from am_diffusers.methods import Method
from am_diffusers.methods.draft import DRaFT
from am_diffusers.methods.parts.tails import TailSettings
from am_diffusers.methods.refl import ReFL, last_quarter
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import guided, latent_spec, micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import end_point_table, reward_of_latents
from am_diffusers.system.processes import Processes


def draft(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """DRaFT of a model on a reward of its decoded pictures."""
    config = plan.config
    return DRaFT(
        guided(model.policy, config.method.rollout_guidance_scale),
        reward_of_latents(model, reward),
        end_point_table(config, model),
        steps=config.baselines.draft_steps,
        latents=latent_spec(config, model),
        settings=_settings(config),
        gather=processes.gather,
    )


def refl(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """ReFL of a model on a reward of its decoded pictures."""
    config = plan.config
    return ReFL(
        guided(model.policy, config.method.rollout_guidance_scale),
        reward_of_latents(model, reward),
        end_point_table(config, model),
        last_steps=config.baselines.refl_last_steps or last_quarter(config.method.num_inference_steps),
        latents=latent_spec(config, model),
        settings=_settings(config),
        gather=processes.gather,
    )


def _settings(config: Config) -> TailSettings:
    options = config.optimizer
    return TailSettings(
        config.method.reward_scale,
        collect_batch_size=micro_batch(options.rollout_micro_batch_size),
        reward_batch_size=micro_batch(options.reward_micro_batch_size),
    )
