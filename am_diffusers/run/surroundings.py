"""Surroundings of a run's method: fields with guidance, the reward of decoded latents, noise, sizes."""

from functools import cache
from pathlib import Path

from am_diffusers.config import Config
from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.methods import METHODS, Method
from am_diffusers.methods.parts.replay import DiskTensors
from am_diffusers.methods.parts.surroundings import Gather, Surroundings, gather_from_one
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.base_scores import DIVERGENCE, base_scores
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
    scores = base_scores(
        config,
        DIVERGENCE,
        make_sampler(config, model, purpose="divergence"),
        model.base,
        [reward],
        prompts=prompts,
        images_per_prompt=options.divergence_samples,
        processes=processes,
    )
    return Tilt.estimate(
        Divergence(options.divergence, options.divergence_q),
        options.scale,
        dict(zip(prompts, scores[reward.name], strict=True)),
        per_prompt=len(prompts) == len(plan.used_train_prompts()),
        max_slope=options.divergence_max_slope,
    )
