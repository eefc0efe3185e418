"""Sizes that the config leaves to the machine: `auto` micro-batches become numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from am_diffusers.auto_batch import Passes, largest_fitting
from am_diffusers.build.methods.parts import make_fields
from am_diffusers.config import OptimizerConfig
from am_diffusers.config.optimizer import MicroBatch
from am_diffusers.load import encoder, latent_spec, weighted
from am_diffusers.models.sd3 import SD3
from am_diffusers.network_calls import trained_rows
from am_diffusers.plan import Plan
from am_diffusers.rewards import Reward
from am_diffusers.system.processes import Processes

SETTINGS = ("rollout_micro_batch_size", "reward_micro_batch_size", "loss_micro_batch_size")


def find_micro_batches(plan: Plan, model: SD3, rewards: Sequence[Reward], processes: Processes) -> Plan:
    """The plan with the largest sizes that fit in place of `auto`; they are printed.

    Raises:
        ValueError: if even a size of 1 doesn't fit.
    """
    options = plan.config.optimizer
    wanted = [name for name in SETTINGS if getattr(options, name) == "auto"]
    if not wanted:
        return plan

    def everywhere(fits: bool) -> bool:
        return bool(processes.gather(torch.tensor([int(fits)], device=model.device)).all())

    passes, share = make_passes(plan, model, rewards), options.train_batch_size // plan.num_processes
    with processes.together():
        sizes = _search(passes, options, share, everywhere)
    found = {name: sizes[name] for name in wanted}
    processes.accelerator.print("\n".join(f"{name}: auto found {size}" for name, size in found.items()))
    return replace(plan, config=replace(plan.config, optimizer=replace(options, **found)))


def _search(
    passes: Passes, options: OptimizerConfig, share: int, everywhere: Callable[[bool], bool]
) -> dict[str, int]:
    """Size by setting; those that aren't `auto` as given, or all there is."""

    def size_of(name: str, largest: int, run: Callable[[int], None]) -> int:
        given: MicroBatch | None = getattr(options, name)
        if given == "auto":
            return largest_fitting(name, largest, run, everywhere)
        return min(given or largest, largest)

    # While the reward's size is open, one picture at a time: the transformer takes most of the time.
    pictures = 1 if options.reward_micro_batch_size == "auto" else options.reward_micro_batch_size
    rollout = size_of(SETTINGS[0], share, lambda size: passes.sweep(size, pictures))
    reward = size_of(SETTINGS[1], rollout, lambda size: passes.sweep(rollout, size))
    loss = size_of(SETTINGS[2], passes.num_rows, passes.loss)
    return dict(zip(SETTINGS, (rollout, reward, loss), strict=True))


def make_passes(plan: Plan, model: SD3, rewards: Sequence[Reward]) -> Passes:
    """The passes of this run."""
    config, options = plan.config, plan.config.method
    reward, fields = weighted(rewards, config), make_fields(config, model)
    return Passes(
        fields.base,
        fields.policy,
        lambda latents, prompts: reward(model.decode(latents), prompts),
        latent_spec(config, model),
        encoder(config, model, options.rollout_guidance_scale),
        plan.used_train_prompts(),
        list(model.lora_parameters().values()),
        num_steps=options.num_inference_steps,
        num_rows=config.optimizer.train_batch_size // plan.num_processes * trained_rows(config),
        offload=config.optimizer.offload_trajectories,
    )
