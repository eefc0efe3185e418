"""Validations of a run, the check of its exported LoRA, and the evaluation at its end."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from am_diffusers.evaluation.certifier import Certifier
from am_diffusers.evaluation.held_out import HeldOut
from am_diffusers.evaluation.pairs import Scorer, official
from am_diffusers.evaluation.validation import Validation, ValidationLog
from am_diffusers.models.base import Model
from am_diffusers.models.proof import prompt_point, verify_lora
from am_diffusers.rewards import ImageFeatures, Reward
from am_diffusers.run.fields import guided
from am_diffusers.run.load import encoder, make_sampler
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes
from am_diffusers.training.trackers import Trackers


def make_scorer(
    plan: Plan, model: Model, trained: Sequence[Reward], held_out: Sequence[Reward]
) -> tuple[Scorer, dict[str, str]]:
    """Make the scorer of image pairs, with published preprocessing, and return each reward's role too.

    Diversity is measured with the last reward that has image features: a held-out one if possible.
    """
    rewards = [official(reward) for reward in [*trained, *held_out]]
    with_features = [reward for reward in rewards[::-1] if isinstance(reward, ImageFeatures)]
    scale = plan.config.evaluation.eval_guidance_scale
    scorer = Scorer(
        make_sampler(plan.config, model),
        base=guided(model.base, scale),
        tuned=guided(model.policy, scale),
        rewards=rewards,
        features=with_features[0] if with_features else None,
    )
    roles = {reward.name: "trained" if i < len(trained) else "held-out" for i, reward in enumerate(rewards)}
    return scorer, roles


def make_validation(
    plan: Plan,
    scorer: Scorer,
    roles: dict[str, str],
    processes: Processes,
    trackers: Trackers,
    certify: Certifier | None,
) -> Validation:
    """Make the validation during training: scores, grids and the certificate."""
    log = ValidationLog(
        Path(plan.config.run.output_dir), track=trackers.log, track_images=trackers.log_images
    )

    return Validation(
        scorer,
        prompts=plan.validation_prompts,
        num_in_grid=plan.num_grid_prompts,
        images_per_prompt=plan.config.evaluation.num_validation_images,
        roles=roles,
        processes=processes,
        log=log.write if processes.is_main else None,
        certify=certify,
    )


def make_verifier(plan: Plan, model: Model) -> Callable[[Path], object]:
    """Return a function that compares a written LoRA with the model, at the first validation prompt."""
    cond = encoder(plan.config, model, 1.0)(plan.validation_prompts[:1])
    width, height = plan.config.model.size
    point = prompt_point(model, cond, height, width)

    def verify(file: Path) -> object:
        # Diffusers warns that there's no LoRA for the text encoders, which is so on purpose.
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            return verify_lora(model, file, point)
        finally:
            diffusers_logging.set_verbosity(verbosity)

    return verify


def make_held_out(plan: Plan, scorer: Scorer, roles: dict[str, str], certify: Certifier | None) -> HeldOut:
    """Make the evaluation at the end."""
    number = plan.config.evaluation.eval_images_per_prompt
    return HeldOut(scorer, plan.eval_prompts, number, roles, certify)
