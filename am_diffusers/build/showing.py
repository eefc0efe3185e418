"""What a run shows of its model: grids, the exported LoRA's check, the evaluation at the end."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from am_diffusers.grids import GridWriter
from am_diffusers.load import encoder, guided, make_sampler
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import Plan
from am_diffusers.rewards import ImageFeatures, Reward
from am_diffusers.run import HeldOut
from am_diffusers.scoring import Scorer, official


def make_grids(plan: Plan, model: SD3) -> GridWriter:
    """The base-vs-tuned grids."""
    config = plan.config
    scale = config.evaluation.eval_guidance_scale
    return GridWriter(
        make_sampler(config, model),
        base=guided(model.base, scale),
        tuned=guided(model.policy, scale),
        prompts=plan.validation_prompts,
        images_per_prompt=config.evaluation.num_validation_images,
        folder=Path(config.run.output_dir) / "samples",
    )


def make_verifier(plan: Plan, model: SD3) -> Callable[[Path], dict[str, float]]:
    """Compares a written LoRA with the model, at the first validation prompt."""
    cond = encoder(plan.config, model, 1.0)(plan.validation_prompts[:1])
    side = plan.config.model.resolution

    def verify(file: Path) -> dict[str, float]:
        # Diffusers warns that there's no LoRA for the text encoders, which is so on purpose.
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            return model.verify_lora(file, cond, side, side)
        finally:
            diffusers_logging.set_verbosity(verbosity)

    return verify


def make_held_out(plan: Plan, model: SD3, trained: Sequence[Reward], held_out: Sequence[Reward]) -> HeldOut:
    """The evaluation at the end: published preprocessing, diversity by the first held-out image features."""
    config = plan.config
    rewards = [official(reward) for reward in [*trained, *held_out]]
    with_features = [reward for reward in rewards[::-1] if isinstance(reward, ImageFeatures)]
    scale = config.evaluation.eval_guidance_scale
    scorer = Scorer(
        make_sampler(config, model),
        base=guided(model.base, scale),
        tuned=guided(model.policy, scale),
        rewards=rewards,
        features=with_features[0] if with_features else None,
    )
    roles = {reward.name: "trained" if i < len(trained) else "held-out" for i, reward in enumerate(rewards)}
    return HeldOut(scorer, plan.eval_prompts, config.evaluation.eval_images_per_prompt, roles)
