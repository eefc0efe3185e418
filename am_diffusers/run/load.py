"""Config to models and rewards: weights onto the device, prompts encoded, a fresh LoRA attached."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from am_diffusers.config import Config, RewardConfig
from am_diffusers.evaluation.images import Sampler
from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.noise import LatentSpec
from am_diffusers.rewards import (
    REWARDS,
    FixedReward,
    LearnedReward,
    Reward,
    RewardOptions,
    RewardScale,
    WeightedRewards,
)
from am_diffusers.rollout import TableSolver
from am_diffusers.run.fields import micro_batch
from am_diffusers.run.init_lora import attach_lora, start_lora
from am_diffusers.run.plan import Plan
from am_diffusers.system.files import asset_path
from am_diffusers.transitions import ode_euler
from am_diffusers.velocity import Conditioning

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENCODE_CHUNK = 64


def load_reward(reward: RewardConfig, config: Config, device: torch.device) -> Reward:
    """Load a reward in the mode it is trained in."""
    options = RewardOptions(
        device=reward.device or device,
        dtype=DTYPES[reward.mixed_precision],
        mode=reward.mode,
        batch_size=reward.batch_size or micro_batch(config.optimizer.reward_micro_batch_size),
        checkpointing=config.model.gradient_checkpointing,
    )
    return open_reward(reward, options)


def open_reward(reward: RewardConfig, options: RewardOptions) -> Reward:
    """Load a reward; those without weights have no options."""
    kind = REWARDS[reward.name]
    if not issubclass(kind, LearnedReward):
        return kind()
    if reward.model is None:
        raise ValueError(f"reward {reward.name} needs a model; `make_plan` fills in the released one")
    path = asset_path(reward.model)
    return kind.from_pretrained(path, revision=reward.revision, sha256=reward.sha256, options=options)


def load_rewards(plan: Plan, device: torch.device) -> tuple[list[Reward], list[Reward]]:
    """Load the trained and the held-out rewards, and check that each can score every prompt of the run.

    Raises:
        ValueError: if weights are missing or don't fit, or a reward can't score a prompt.
    """
    trained = [load_reward(reward, plan.config, device) for reward in plan.config.method.rewards]
    held_out = [load_reward(reward, plan.config, device) for reward in plan.held_out]
    for rewards, prompts in (
        (trained, plan.used_train_prompts()),
        ([*trained, *held_out], [*plan.validation_prompts, *plan.eval_prompts]),
    ):
        for reward in rewards:
            if isinstance(reward, LearnedReward | FixedReward):
                reward.check_can_score(prompts)
    return trained, held_out


def load_model(plan: Plan, device: torch.device) -> Model:
    """Load the model as `load_base` does, with the run's LoRA as it starts."""
    model = load_base(plan, device)
    attach_lora(model, plan.config)
    start_lora(model, plan.config)
    return model


def load_base(plan: Plan, device: torch.device) -> Model:
    """Load the model without a LoRA; encode all prompts of the run if the text encoders are freed."""
    config = plan.config
    options = config.model
    source = Pretrained(options.pretrained_model_name_or_path, options.revision, options.variant)
    model = Model.from_pretrained(source, weight_dtype=DTYPES[options.mixed_precision], device=device)
    if options.free_text_encoders:
        texts = [*plan.used_train_prompts(), *plan.validation_prompts, *plan.eval_prompts]
        guidance = max(config.shared.rollout_guidance_scale, config.evaluation.eval_guidance_scale)
        for start in range(0, len(texts), ENCODE_CHUNK):
            encoder(config, model, guidance)(texts[start : start + ENCODE_CHUNK])
        model.free_text_encoders()
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def encoder(config: Config, model: Model, guidance_scale: float) -> Callable[[Sequence[str]], Conditioning]:
    """Return a function from prompts to conditioning, with the negative prompt if guidance needs it."""
    return partial(
        model.encode_prompts,
        max_sequence_length=config.model.max_sequence_length,
        negative_prompt=None if guidance_scale == 1 else config.model.negative_prompt,
    )


def latent_spec(config: Config, model: Model) -> LatentSpec:
    """Return the shape and device of one latent."""
    width, height = config.model.size
    return LatentSpec(model.latent_shape(height, width), model.device)


def weighted(rewards: Sequence[Reward], config: Config) -> WeightedRewards:
    """Return the weighted sum of the trained rewards."""
    scales = [RewardScale(reward.weight, reward.mean, reward.std) for reward in config.method.rewards]
    return WeightedRewards(rewards, scales)


def make_sampler(config: Config, model: Model, *, purpose: str = "picture") -> Sampler:
    """Make the ODE sampler of validation and evaluation; its noise depends on `purpose`."""
    evaluation, latents = config.evaluation, latent_spec(config, model)
    return Sampler(
        solver=TableSolver(ode_euler(model.ode_sigmas(evaluation.eval_inference_steps, latents.shape))),
        encode=encoder(config, model, evaluation.eval_guidance_scale),
        decode=model.decode,
        latents=latents,
        seed=config.run.seed,
        batch_size=evaluation.eval_batch_size,
        purpose=purpose,
    )
