"""The estimate of a run, and how the dry run prints it."""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator

from am_diffusers.config.belonging import BUFFERED
from am_diffusers.estimate.iteration import (
    ADJOINT,
    LOSS,
    REWARD,
    ROLLOUT,
    SAMPLING,
    STEP,
    estimable,
    run_iteration,
    sample_pictures,
)
from am_diffusers.estimate.pretend import Pretence, pretend, weights_of
from am_diffusers.estimate.tracker import Flops, Tracker, Usage
from am_diffusers.gpus import GPUS, find_gpu
from am_diffusers.load import micro_batch
from am_diffusers.models.pretrained import MissingModelError
from am_diffusers.network_calls import trained_rows
from am_diffusers.plan import Plan
from am_diffusers.processes import Processes
from am_diffusers.train_state import TrainState

UTILISATION = 0.4
"""Share of a card's peak that is assumed; large bfloat16 models reach 0.3 to 0.5 when they are tuned."""
USABLE = 0.9
"""Share of a card's memory that is counted on: the rest is CUDA's context, workspaces and fragmentation."""
ENCODING = "prompt encoding"
COLLECTING = (ROLLOUT, ADJOINT, REWARD)
"""Phases that a method with a buffer has in some iterations only."""
GIB = 2**30
KNOBS = {
    ENCODING: "mixed_precision",
    ROLLOUT: "rollout_micro_batch_size, offload_trajectories",
    ADJOINT: "rollout_micro_batch_size, gradient_checkpointing",
    REWARD: "reward_micro_batch_size, rollout_micro_batch_size, gradient_checkpointing",
    LOSS: "loss_micro_batch_size, gradient_checkpointing",
    STEP: "rank",
    SAMPLING: "eval_batch_size",
}


@dataclass(frozen=True)
class Estimate:
    """What one process of a run needs.

    Attributes:
        resident: bytes held all the time, by what holds them.
        phases: needs of each phase, all that is resident included in `peak` and `before`.
        main_memory: bytes of encoded prompts, on the CPU.
        picture_flops: of one picture of grids and evaluation, scores included.
        num_pictures: of all grids and the evaluation, on this process.
    """

    resident: dict[str, int]
    phases: dict[str, Usage]
    main_memory: int
    picture_flops: Flops
    num_pictures: float

    @property
    def highest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> int:
        """Most bytes held at a time."""
        return self.phases[self.highest].peak

    def iteration_flops(self) -> Flops:
        """FLOPs of an iteration by dtype, recomputation included, no row masked."""
        return sum((usage.flops for name, usage in self.phases.items() if name != SAMPLING), Counter())

    def seconds(self, gpu: str, iterations: int, *, allow_tf32: bool) -> float:
        """Time of so many iterations on a card of `GPUS` at `UTILISATION` of its peak."""
        flops = {dtype: number * iterations for dtype, number in self.iteration_flops().items()}
        return find_gpu(gpu).seconds(flops, utilisation=UTILISATION, allow_tf32=allow_tf32)


def estimate(plan: Plan, accelerator: Accelerator, *, on_gpu: bool) -> Estimate:
    """Run an iteration without data.

    Args:
        plan: the run.
        accelerator: its processes; nothing is exchanged.
        on_gpu: cast as a GPU does, and keep encoded prompts off it.

    Raises:
        ValueError: if configuration files are missing (with the command that downloads them), or there's no
            estimate for the method or a reward.
    """
    plan = estimable(plan)
    samples, in_memory = _samples(plan, on_gpu)
    every = plan.config.buffer.buffer_refresh if plan.config.method.method in BUFFERED else 1
    pretence, tracker = pretend(plan, on_gpu=on_gpu), Tracker()
    with tracker:
        resident = _hold_weights(plan, pretence, tracker)
        main_memory = pretence.prompt_bytes * _num_texts(plan)
        if not on_gpu:
            resident["encoded prompts"] = main_memory
        extra = sum(resident.values()) - tracker.live
        extra += (samples - in_memory) * pretence.prompt_bytes
        with tracker.holding(extra):
            state = run_iteration(plan, pretence, tracker, Processes(accelerator), samples=in_memory)
            pictures = sample_pictures(plan, pretence, tracker)
    for name in set(tracker.phases) - {SAMPLING}:
        usage, share = tracker.phases[name], in_memory * (every if name in COLLECTING else 1)
        usage.flops = Counter({dtype: n * samples // share for dtype, n in usage.flops.items()})
    resident |= _hold_state(resident["LoRA"], state)
    weights = resident["transformer"] + resident["VAE"] + pretence.text_bytes
    encoding = Usage(weights, weights)
    flops = tracker.phases[SAMPLING].flops
    return Estimate(
        resident=resident,
        phases={ENCODING: encoding} | tracker.phases,
        main_memory=main_memory,
        picture_flops=Counter({dtype: round(number / pictures) for dtype, number in flops.items()}),
        num_pictures=_num_pictures(plan),
    )


def fits(found: Estimate, memory: float) -> bool:
    """Whether the peak is within the `USABLE` share of so many GiB."""
    return found.peak <= USABLE * memory * GIB


def _hold_weights(plan: Plan, pretence: Pretence, tracker: Tracker) -> dict[str, int]:
    """Bytes of all weights by owner; the tracker holds those that are tensors."""
    model = pretence.model
    resident = {"LoRA": tracker.hold(model.lora_parameters().values())}
    resident["transformer"] = tracker.hold([*model.transformer.parameters(), *model.transformer.buffers()])
    resident["VAE"] = tracker.hold(model.vae.parameters())
    for reward in [*pretence.rewards, *pretence.held_out]:
        resident[f"reward {reward.name}"] = tracker.hold(weights_of(reward))
    if not plan.config.model.free_text_encoders:
        resident["text encoders"] = pretence.text_bytes
    return resident


def _hold_state(lora: int, state: TrainState) -> dict[str, int]:
    """Bytes of what belongs to the optimizer's steps."""
    values = [value for states in state.optimizer.state.values() for value in states.values()]
    moments = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
    return {"LoRA gradients": lora, "optimizer": moments, "EMA": lora if state.ema is not None else 0}


def _samples(plan: Plan, on_gpu: bool) -> tuple[int, int]:
    """Samples of a process, and how many are in the device's memory together.

    With `offload_trajectories` that is those of a chunk, or as many as a micro-batch of the loss has.
    """
    options = plan.config.optimizer
    share = options.train_batch_size // plan.num_processes
    if not (on_gpu and options.offload_trajectories):
        return share, share
    rows = trained_rows(plan.config)
    chunk = micro_batch(options.rollout_micro_batch_size) or share
    return share, min(share, max(chunk, -(-int(options.loss_micro_batch_size) // rows)))


def _num_texts(plan: Plan) -> int:
    """Prompts that are kept encoded, the empty negative one included."""
    return len({*plan.used_train_prompts(), *plan.validation_prompts, *plan.eval_prompts, ""})


def _num_pictures(plan: Plan) -> float:
    """Pictures of the main process: base and tuned ones, all grids and its share of the evaluation."""
    options, steps = plan.config.evaluation, plan.config.optimizer.max_train_steps
    grids = 2 + -(-steps // options.validation_steps)
    in_grids = grids * len(plan.validation_prompts) * options.num_validation_images
    return in_grids + 2 * options.eval_images_per_prompt * len(plan.eval_prompts) / plan.num_processes


def describe(plan: Plan, accelerator: Accelerator) -> str:
    """The estimate as comment lines; what is missing for one, if it can't be made."""
    on_gpu = plan.config.run.gpu is not None or accelerator.device.type != "cpu"
    try:
        found = estimate(plan, accelerator, on_gpu=on_gpu)
    except MissingModelError as error:
        reason = str(error).replace("\n", "\n#   ")
        return (
            f"# memory, FLOPs and hours: their estimate needs the model's configuration files\n#   {reason}\n"
        )
    except ValueError as error:
        return f"# memory, FLOPs and hours: not estimated: {error}\n"
    lines = [*_memory(found), *_bounds(plan), *_flops(found), *_hours(plan, found)]
    return "".join(f"# {line}\n" for line in lines)


def _memory(found: Estimate) -> list[str]:
    rows = [
        f"  {name:<24} {_gib(usage.peak)} = {_gib(usage.before)} held before + "
        f"{_gib(usage.peak - usage.before)}"
        for name, usage in found.phases.items()
    ]
    return [
        "memory of a process by phase (estimated without weights or a GPU; kernels' workspaces not counted):",
        *rows,
        "  held all the time: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in found.resident.items() if size),
        f"  peak: {_gib(found.peak)} in {found.highest}; lower with {KNOBS[found.highest]}",
        f"  encoded prompts in main memory: {_gib(found.main_memory)}",
    ]


def _bounds(plan: Plan) -> list[str]:
    """What was estimated otherwise than the run will be."""
    before, after = plan.config.optimizer, estimable(plan).config.optimizer
    changed = [name for name, value in asdict(before).items() if value != getattr(after, name)]
    return [f"  estimated with {name} {getattr(after, name)}, a bound" for name in changed]


def _flops(found: Estimate) -> list[str]:
    flops = found.iteration_flops()
    kinds = ", ".join(f"{n / 1e12:.4g} {str(d).removeprefix('torch.')}" for d, n in flops.items() if n)
    total = sum(flops.values()) / 1e12
    return [f"TFLOPs an iteration and process (no row masked): {total:.4g} ({kinds})"]


def _hours(plan: Plan, found: Estimate) -> list[str]:
    name, tf32 = plan.config.run.gpu, plan.config.run.allow_tf32
    if name is None:
        return [f"hours: name a card with --gpu ({', '.join(GPUS)})"]
    gpu, steps = find_gpu(name), plan.config.optimizer.max_train_steps
    training = found.seconds(name, steps, allow_tf32=tf32) / 3600
    pictures = gpu.seconds(found.picture_flops, utilisation=UTILISATION, allow_tf32=tf32)
    return [
        f"on {name}: {training:.3g} hours for {steps} iterations and "
        f"{pictures * found.num_pictures / 3600:.2g} for pictures, at an assumed {UTILISATION:.0%} of its "
        "published peak (never measured)",
        f"memory of {name}: {gpu.memory} GiB, of which {USABLE:.0%} are counted on: "
        + ("it fits" if fits(found, gpu.memory) else f"it does NOT fit; lower {KNOBS[found.highest]}"),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
