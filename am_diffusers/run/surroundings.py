"""Surroundings of a run's method: fields with guidance, the reward of decoded latents, noise, sizes."""

from functools import cache
from pathlib import Path

from torch import Tensor

from am_diffusers.config import Config
from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.evaluation.base_rewards import (
    BASE_REWARDS_FILE,
    base_rewards,
    load_base_rewards,
    save_base_rewards,
)
from am_diffusers.methods import METHODS, Method
from am_diffusers.methods.parts.replay import DiskTensors
from am_diffusers.methods.parts.surroundings import Gather, Surroundings, gather_from_one
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.fields import Fields, sizes, with_guidance
from am_diffusers.run.load import encoder, latent_spec, make_sampler
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes


def make_method(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Method:
    """Make the method of a run."""
    config = plan.config
    processes.on_main(DiskTensors(Path(config.run.output_dir)).clean)
    around = surroundings(
        config,
        model,
        reward,
        with_guidance(config, model.policy, model.base),
        gather=processes.gather,
        tilt=make_tilt(plan, model, reward, processes),
    )
    return METHODS[config.method.method](around, config.shared, config.settings)


def surroundings(
    config: Config,
    model: Model,
    reward: Reward,
    fields: Fields,
    *,
    gather: Gather = gather_from_one,
    tilt: Tilt | None = None,
) -> Surroundings:
    """Return what a method is given around a model.

    Args:
        config: flags of the run.
        model: model that decodes latents and knows noise levels and shapes.
        reward: reward of images.
        fields: fields whose velocities are taken.
        gather: function that concatenates a 1-D tensor over ranks.
        tilt: law aimed at, if it isn't the reweighted base.
    """
    latents = latent_spec(config, model)
    return Surroundings(
        *fields[:2],
        reward=lambda latents, prompts: reward(model.decode(latents), prompts),
        latents=latents,
        sigmas=cache(
            lambda steps, noisy: (model.sde_sigmas if noisy else model.ode_sigmas)(steps, latents.shape)
        ),
        rollout=fields.rollout,
        encode=encoder(config, model, config.shared.rollout_guidance_scale),
        sizes=sizes(config),
        iterations=config.optimizer.max_train_steps,
        folder=Path(config.run.output_dir),
        gather=gather,
        tilt=tilt,
    )


def make_tilt(plan: Plan, model: Model, reward: Reward, processes: Processes) -> Tilt | None:
    """Return the law of a divergence other than kl, its normalisers estimated on base images."""
    config, options = plan.config, plan.config.shared
    if options.divergence == "kl":
        return None
    prompts = plan.some_train_prompts(options.divergence_prompts, "divergence")
    file = Path(config.run.output_dir) / BASE_REWARDS_FILE
    # Those of the run that is resumed; a fresh start removed them.
    scores = processes.from_main(lambda: load_base_rewards(file, prompts) if file.exists() else None)
    if scores is None:
        scores = _base_rewards(plan, model, reward, prompts, processes)
        processes.on_main(lambda: save_base_rewards(file, prompts, scores))
    return Tilt.estimate(
        Divergence(options.divergence, options.divergence_q),
        options.reward_scale,
        dict(zip(prompts, scores[reward.name], strict=True)),
        per_prompt=len(prompts) == len(plan.used_train_prompts()),
        max_slope=options.divergence_max_slope,
    )


def _base_rewards(
    plan: Plan, model: Model, reward: Reward, prompts: list[str], processes: Processes
) -> dict[str, Tensor]:
    sampler, number = (
        make_sampler(plan.config, model, purpose="divergence"),
        plan.config.shared.divergence_samples,
    )
    with processes.together():
        return base_rewards(sampler, model.base, [reward], prompts, number, processes=processes)
