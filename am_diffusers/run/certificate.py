"""The certificate of a run, and reward_scale auto: both from base images by the chain of training."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from am_diffusers.config import Config
from am_diffusers.evaluation.certifier import Certifier
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.frontier_table import frontier_table
from am_diffusers.evaluation.images import Sampler
from am_diffusers.evaluation.pairs import official
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.rollout import TableSolver
from am_diffusers.run.base_scores import (
    CERTIFICATE,
    FRONTIER,
    base_scores,
    stored_frontier,
    trained_scales,
)
from am_diffusers.run.fields import with_guidance
from am_diffusers.run.load import encoder, make_sampler
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes
from am_diffusers.transitions import TRANSITIONS

logger = logging.getLogger(__name__)

PROMPTS = 32
"""Training prompts whose base images choose the reward scale."""


def chain_sampler(config: Config, model: Model, purpose: str) -> Sampler:
    """Make the sampler of the chain of training: its table, guidance and number of steps."""
    sampler, shared = make_sampler(config, model, purpose=purpose), config.shared
    sigmas = model.sde_sigmas(shared.num_inference_steps, sampler.latents.shape)
    return replace(
        sampler,
        solver=TableSolver(TRANSITIONS[shared.transitions](sigmas)),
        encode=encoder(config, model, shared.rollout_guidance_scale),
    )


def with_scale(
    plan: Plan, model: Model, trained: list[Reward], held_out: list[Reward], processes: Processes
) -> Plan:
    """Return the plan with the number that reward_scale auto stands for.

    Raises:
        ValueError: if the base images can't tell so large a KL; says up to which they can.
    """
    config, shared = plan.config, plan.config.shared
    if shared.target_kl is None:
        return plan
    frontier = None if config.evaluation.frontier is None else stored_frontier(config)
    if frontier is None:
        scores = base_scores(
            config,
            FRONTIER,
            chain_sampler(config, model, "calibration"),
            with_guidance(config, model.policy, model.base).base,
            [*trained, *map(official, held_out)],
            prompts=plan.some_train_prompts(PROMPTS, "calibration"),
            images_per_prompt=config.evaluation.certificate_images,
            processes=processes,
        )
        frontier = Frontier.of(scores, trained_scales(config))
    try:
        scale = frontier.scale_at(shared.target_kl)
    except ValueError as error:
        raise ValueError(
            f"--target_kl {shared.target_kl:g}: {error}; lower it, or raise --certificate_images"
        ) from error
    processes.accelerator.print("\n".join(frontier_table(frontier, list(trained_scales(config)))))
    processes.accelerator.print(f"reward_scale {scale:.4g} for target_kl {shared.target_kl:g}")
    return replace(plan, config=replace(config, shared=replace(shared, reward_scale=scale, target_kl=None)))


def make_certifier(
    plan: Plan,
    model: Model,
    trained: list[Reward],
    held_out: list[Reward],
    processes: Processes,
    *,
    scores: Mapping[str, Tensor] | None = None,
) -> Certifier | None:
    """Make the certificate of a run on its validation prompts.

    None where there can't be one: without images, for a divergence other than kl, for a reward that tells no
    images apart.

    Args:
        plan: plan of the run.
        model: model with its LoRA.
        trained: trained rewards.
        held_out: held-out rewards.
        processes: share the work.
        scores: scores (P, S) of the base's images by reward, where they are known; None = they are made.
    """
    config, number = plan.config, plan.config.evaluation.certificate_images
    if number == 0 or config.shared.divergence != "kl":
        return None
    sampler = chain_sampler(config, model, "certificate")
    rewards = [*trained, *map(official, held_out)]
    fields = with_guidance(config, model.policy, model.base)
    if scores is None:
        scores = base_scores(
            config,
            CERTIFICATE,
            sampler,
            fields.base,
            rewards,
            prompts=plan.validation_prompts,
            images_per_prompt=number,
            processes=processes,
        )
    try:
        frontier = Frontier.of(scores, trained_scales(config))
    except ValueError as error:
        logger.warning("no certificate: %s", error)
        return None
    return Certifier(
        frontier=frontier,
        scale=config.shared.scale,
        sampler=sampler,
        base=fields.base,
        tuned=fields.policy,
        rewards=rewards,
        trained=trained_scales(config),
        prompts=plan.validation_prompts,
        images_per_prompt=min(number, config.evaluation.num_validation_images),
        processes=processes,
    )
