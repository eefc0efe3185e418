"""One iteration of a run on data-free tensors: the real method, fields, VAE, rewards, loss and optimizer.

A transformer call is run once for each size of its input and counted again wherever the method makes the
same call, on top of what is held there; so is a pass of VAE and rewards (`passes.py`). Everything between the
calls runs as is. Methods that take rewards in the loss have them in its phase.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from am_diffusers.estimate.passes import (
    LOSS,
    ROLLOUT,
    SAMPLING,
    STEP,
    Costs,
    Field,
    Noise,
    RewardPass,
    TerminalPass,
)
from am_diffusers.estimate.pretend import Pretence
from am_diffusers.estimate.tracker import Tracker
from am_diffusers.evaluation.images import image_ids
from am_diffusers.methods import METHODS, Method
from am_diffusers.methods.base import Collected
from am_diffusers.noise import generator_for, generators_for
from am_diffusers.rewards.learned import Skeleton
from am_diffusers.run.fields import guided, with_guidance
from am_diffusers.run.load import encoder, make_sampler, weighted
from am_diffusers.run.micro_batches import SETTINGS
from am_diffusers.run.plan import Plan
from am_diffusers.run.surroundings import surroundings
from am_diffusers.run.training import make_state
from am_diffusers.system.half_precision import ScaledBackward
from am_diffusers.terminal_cost import RewardOfLatents
from am_diffusers.training.state import TrainState


def run_iteration(plan: Plan, pretence: Pretence, tracker: Tracker, *, samples: int) -> TrainState:
    """Run an iteration of one process after its first, in the tracker's phases; weights are held already.

    Args:
        plan: an `estimable` plan.
        pretence: model and rewards of the run.
        tracker: tracker, entered already.
        samples: samples of the iteration on this process.
    """
    config, model = plan.config, pretence.model
    method = _method(plan, pretence, tracker)
    state = make_state(config.optimizer, model.lora_parameters())
    with tracker.phase(STEP):
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        state.step()
    groups, prompts = config.shared.samples_per_prompt, plan.train_prompts
    prompts = [prompts[i // groups % len(prompts)] for i in range(samples)]
    with tracker.phase(ROLLOUT):
        cond = encoder(config, model, config.shared.rollout_guidance_scale)(prompts)
        generators = generators_for(config.run.seed, 0, range(samples))
        collected = method.collect(cond, generators, generator_for(config.run.seed, 0, "shared"))
    with tracker.phase(LOSS):
        _loss(method, collected, state, int(config.optimizer.loss_micro_batch_size), tracker)
    with tracker.phase(STEP):
        torch.nn.utils.clip_grad_norm_(state.parameters.values(), config.optimizer.max_grad_norm)
        state.step()
    return state


def _loss(method: Method, collected: Collected, state: TrainState, size: int, tracker: Tracker) -> None:
    """Take the loss of all rows; with several micro-batches gradients exist before the first."""
    batches = collected.examples.split(size)
    if len(batches) == 1:
        state.optimizer.zero_grad()
    scaled = ScaledBackward(list(state.parameters.values()))

    def backward() -> None:
        with torch.enable_grad():
            scaled.backward(method.loss(batches[0])[0], batches[0].weight)

    tracker.replay(tracker.cost(backward), len(collected.examples) / len(batches[0]))
    scaled.finish()


def estimable(plan: Plan) -> Plan:
    """Return the plan with everything that depends on data or on a device set to a bound.

    No row is masked and no tilt estimated, `auto` is 1 (the least it tries), moments take 32 bits.
    """
    config, optimizer = plan.config, plan.config.optimizer
    found: dict[str, Any] = {name: 1 for name in SETTINGS if getattr(optimizer, name) == "auto"}
    if optimizer.optimizer == "adamw8bit":
        found["optimizer"] = "adamw"
    changed = replace(
        config,
        shared=replace(config.shared, mask_quantile=None, divergence="kl", reward_clip_quantile=None),
        own={name: METHODS[name].dearest(own) for name, own in config.own.items()},
        optimizer=replace(optimizer, **found),
    )
    return replace(plan, config=changed)


def sample_images(plan: Plan, pretence: Pretence, tracker: Tracker) -> int:
    """Sample and score one batch of grids or evaluation, after `run_iteration`; return its size."""
    config, model = plan.config, pretence.model
    evaluation, prompts = config.evaluation, plan.eval_prompts or plan.validation_prompts
    a_prompt = evaluation.eval_images_per_prompt if plan.eval_prompts else evaluation.num_validation_images
    which = image_ids(len(prompts), a_prompt)[: evaluation.eval_batch_size]
    sampler = make_sampler(config, model)
    sampler = replace(sampler, latents=Noise(pretence, sampler.latents.shape))  # pyright: ignore[reportArgumentType]
    with tracker.phase(SAMPLING), torch.no_grad():
        field = guided(Field(model.policy, tracker, Costs()), evaluation.eval_guidance_scale)
        images = sampler.images(field, prompts, which)
        texts = [prompts[image.prompt] for image in which]
        if plan.eval_prompts:  # base and tuned together
            for reward in [*pretence.rewards, *pretence.held_out]:
                if isinstance(reward, Skeleton):
                    reward(torch.cat([images, images]), [*texts, *texts])
    return len(which)


def _method(plan: Plan, pretence: Pretence, tracker: Tracker) -> Method:
    """Make the method around the model's fields, each of whose calls is run once."""
    model, config, costs = pretence.model, plan.config, Costs()
    kind = METHODS[config.method.method]
    fields = with_guidance(config, Field(model.policy, tracker, costs), Field(model.base, tracker, costs))
    around = surroundings(config, model, weighted(pretence.rewards, config), fields)
    reward = around.reward if kind.needs_reward_gradient else RewardPass(_without_data(pretence), tracker)
    around = replace(
        around,
        reward=reward,
        latents=Noise(pretence, around.latents.shape),
        terminal_cost=partial(TerminalPass, tracker),
    )
    return kind(around, config.shared, config.settings).collector


def _without_data(pretence: Pretence) -> RewardOfLatents:
    """Return the rewards that run without data; the others count pixels on the CPU."""
    usable = [r for r in pretence.rewards if isinstance(r, Skeleton) or r.differentiable]

    def scored(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        images = pretence.model.decode(latents)
        for reward in usable:
            reward(images, prompts)
        return latents.new_empty(len(latents))

    return scored
