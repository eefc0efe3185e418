"""The estimate of a run as the dry run prints it."""

from dataclasses import asdict

from accelerate import Accelerator

from am_diffusers.estimate.iteration import estimable
from am_diffusers.estimate.passes import ADJOINT, LOSS, REWARD, ROLLOUT, SAMPLING, STEP
from am_diffusers.estimate.report import ENCODING, USABLE, UTILISATION, Estimate, estimate, fits
from am_diffusers.models.pretrained import MissingModelError
from am_diffusers.run.plan import Plan
from am_diffusers.system.gpus import GPUS, find_gpu
from am_diffusers.system.offline import offline

GIB = 2**30
KNOBS = {
    ENCODING: "mixed_precision",
    ROLLOUT: "rollout_micro_batch_size, offload_trajectories",
    ADJOINT: "rollout_micro_batch_size, gradient_checkpointing",
    REWARD: "reward_micro_batch_size, rollout_micro_batch_size, gradient_checkpointing",
    LOSS: "loss_micro_batch_size, gradient_checkpointing (reward_micro_batch_size, if it takes rewards)",
    STEP: "rank",
    SAMPLING: "eval_batch_size",
}


@offline()
def describe(plan: Plan, accelerator: Accelerator) -> str:
    """Return the estimate as comment lines, or what is missing for one; the network is left alone."""
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
    lines = [*_memory(found, plan.num_processes), *_bounds(plan), *_flops(found), *_hours(plan, found)]
    return "".join(f"# {line}\n" for line in lines)


def _memory(found: Estimate, processes: int) -> list[str]:
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
        f"  encoded prompts in main memory: {_gib(found.main_memory)}{_of_all(found, processes)}",
        *_buffer(found),
    ]


def _of_all(found: Estimate, processes: int) -> str:
    """Say what several processes hold that share a machine: each encodes and keeps all prompts."""
    together = _gib(found.main_memory * processes)
    return "" if processes == 1 else f" in each process, {together} if all {processes} are on one machine"


def _buffer(found: Estimate) -> list[str]:
    size = found.buffer
    if not size.peak:
        return []
    kept = _gib(size.stored + size.falling_out)
    return [f"  buffer, at --buffer_storage: {kept}, and {_gib(size.drawn)} of drawn rows in main memory"]


def _bounds(plan: Plan) -> list[str]:
    """Return lines on the settings that were estimated at a bound."""
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
    images = gpu.seconds(found.image_flops, utilisation=UTILISATION, allow_tf32=tf32)
    return [
        f"on {name}: {training:.3g} hours for {steps} iterations and "
        f"{images * found.num_images / 3600:.2g} for images, at an assumed {UTILISATION:.0%} of its "
        "published peak (never measured)",
        f"memory of {name}: {gpu.memory} GiB, of which {USABLE:.0%} are counted on: "
        + ("it fits" if fits(found, gpu.memory) else f"it does NOT fit; lower {KNOBS[found.highest]}"),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
