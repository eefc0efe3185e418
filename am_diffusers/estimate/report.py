"""The estimate of a run: what it holds all the time, and an iteration without data on top."""

from collections import Counter
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from am_diffusers.estimate.iteration import estimable, run_iteration, sample_images
from am_diffusers.estimate.passes import ADJOINT, REWARD, ROLLOUT, SAMPLING
from am_diffusers.estimate.pretend import Pretence, pretend, weights_of
from am_diffusers.estimate.tracker import Flops, Tracker, Usage
from am_diffusers.methods.parts.kept import KeptBytes
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.run.counting import Counted, count, described_latents
from am_diffusers.run.fields import micro_batch
from am_diffusers.run.plan import Plan
from am_diffusers.system.gpus import find_gpu
from am_diffusers.training.state import TrainState

UTILISATION = 0.4
"""Share of a card's peak that is assumed; large bfloat16 models reach 0.3 to 0.5 when they are tuned."""
USABLE = 0.9
"""Share of a card's memory that is counted on: the rest is CUDA's context, workspaces and fragmentation."""
ENCODING = "prompt encoding"
COLLECTING = (ROLLOUT, ADJOINT, REWARD)
"""Phases that occur in some iterations only, if a method trains on rows again."""
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Needs of one process of a run.

    Attributes:
        resident: bytes held all the time, by what holds them.
        phases: needs of each phase; `peak` and `before` include all that is resident.
        main_memory: bytes of encoded prompts, on the CPU.
        buffer: this process's share of a buffer of trajectories, on the CPU or a disk; 0 for most methods.
        image_flops: FLOPs of one image of grids and evaluation, scores included.
        num_images: number of images of all grids and the evaluation, on this process.
    """

    resident: dict[str, int]
    phases: dict[str, Usage]
    main_memory: int
    buffer: KeptBytes
    image_flops: Flops
    num_images: float

    @property
    def highest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> int:
        """Most bytes held at a time."""
        return self.phases[self.highest].peak

    def iteration_flops(self) -> Flops:
        """Return the FLOPs of an iteration by dtype, recomputation included, no row masked."""
        return sum((usage.flops for name, usage in self.phases.items() if name != SAMPLING), Counter())

    def seconds(self, gpu: str, iterations: int, *, allow_tf32: bool) -> float:
        """Return the time of `iterations` iterations on a card of `GPUS` at `UTILISATION` of its peak."""
        flops = {dtype: number * iterations for dtype, number in self.iteration_flops().items()}
        return find_gpu(gpu).seconds(flops, utilisation=UTILISATION, allow_tf32=allow_tf32)


def estimate(plan: Plan, accelerator: Accelerator, *, on_gpu: bool) -> Estimate:
    """Estimate a run by an iteration without data.

    Args:
        plan: the run.
        accelerator: processes of the run; nothing is exchanged.
        on_gpu: cast as a GPU does, and keep encoded prompts off it.

    Raises:
        ValueError: if configuration files are missing (with the command that downloads them), or there's no
            estimate for the method or a reward.
    """
    plan = estimable(plan)
    counted = count(plan.config)
    samples, in_memory = _samples(plan, on_gpu, counted.rows)
    buffer = _buffer(plan, counted)
    pretence, tracker = pretend(plan, on_gpu=on_gpu), Tracker()
    with tracker:
        resident = _hold_weights(plan, pretence, tracker)
        main_memory = pretence.prompt_bytes * _num_texts(plan)
        if not on_gpu:
            resident["encoded prompts"] = main_memory
            if buffer.in_memory:  # the iteration itself makes the rows that are drawn
                resident["buffer"] = buffer.stored + buffer.falling_out
        extra = sum(resident.values()) - tracker.live
        extra += (samples - in_memory) * pretence.prompt_bytes
        with tracker.holding(extra):
            state = run_iteration(plan, pretence, tracker, samples=in_memory)
            images = sample_images(plan, pretence, tracker)
    for name in set(tracker.phases) - {SAMPLING}:
        usage, share = tracker.phases[name], in_memory * (counted.period if name in COLLECTING else 1)
        usage.flops = Counter({dtype: n * samples // share for dtype, n in usage.flops.items()})
    resident |= _hold_state(resident["LoRA"], state)
    weights = resident["transformer"] + resident["VAE"] + pretence.text_bytes
    encoding = Usage(weights, weights)
    flops = tracker.phases[SAMPLING].flops
    return Estimate(
        resident=resident,
        phases={ENCODING: encoding} | tracker.phases,
        main_memory=main_memory,
        buffer=buffer,
        image_flops=Counter({dtype: round(number / images) for dtype, number in flops.items()}),
        num_images=_num_images(plan),
    )


def fits(found: Estimate, memory: float) -> bool:
    """Return whether the peak is within the `USABLE` share of `memory` GiB."""
    return found.peak <= USABLE * memory * GIB


def _hold_weights(plan: Plan, pretence: Pretence, tracker: Tracker) -> dict[str, int]:
    """Count the bytes of all weights by owner; the tracker holds those that are tensors."""
    model = pretence.model
    resident = {"LoRA": tracker.hold(model.lora_parameters().values())}
    resident["transformer"] = tracker.hold([*model.network.parameters(), *model.network.buffers()])
    resident["VAE"] = tracker.hold(model.vae.parameters())
    for reward in [*pretence.rewards, *pretence.held_out]:
        resident[f"reward {reward.name}"] = tracker.hold(weights_of(reward))
    if not plan.config.model.free_text_encoders:
        resident["text encoders"] = pretence.text_bytes
    return resident


def _hold_state(lora: int, state: TrainState) -> dict[str, int]:
    """Count the bytes of what belongs to the optimizer's steps."""
    values = [value for states in state.optimizer.state.values() for value in states.values()]
    moments = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
    return {"LoRA gradients": lora, "optimizer": moments, "EMA": lora if state.ema is not None else 0}


def _samples(plan: Plan, on_gpu: bool, rows: int) -> tuple[int, int]:
    """Return the samples of a process, and how many of them are in the device's memory together.

    With `offload_trajectories` these are the samples of a chunk, or of a micro-batch of the loss.
    """
    options = plan.config.optimizer
    share = options.train_batch_size // plan.num_processes
    if not (on_gpu and options.offload_trajectories):
        return share, share
    chunk = micro_batch(options.rollout_micro_batch_size) or share
    return share, min(share, max(chunk, -(-int(options.loss_micro_batch_size) // rows)))


def _buffer(plan: Plan, counted: Counted) -> KeptBytes:
    """Return a process's share of what the method keeps."""
    model = plan.config.model
    source = Pretrained(model.pretrained_model_name_or_path, model.revision, model.variant)
    kept = counted.method.kept_bytes(counted.rows, described_latents(source, model.size))
    return kept.of_one(plan.num_processes)


def _num_texts(plan: Plan) -> int:
    """Count the prompts that are kept encoded, the negative one included."""
    negative = plan.config.model.negative_prompt
    return len({*plan.used_train_prompts(), *plan.validation_prompts, *plan.eval_prompts, negative})


def _num_images(plan: Plan) -> float:
    """Count the images of the main process: base and tuned, all grids and its share of the evaluation."""
    options, steps = plan.config.evaluation, plan.config.optimizer.max_train_steps
    grids = 2 + -(-steps // options.validation_steps)
    in_grids = grids * len(plan.validation_prompts) * options.num_validation_images
    return in_grids + 2 * options.eval_images_per_prompt * len(plan.eval_prompts) / plan.num_processes
