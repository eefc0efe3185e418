"""Config to buffered Adjoint Matching."""

from pathlib import Path

from am_diffusers.methods.buffered_adjoint_matching import BufferedAdjointMatching, BufferSettings
from am_diffusers.methods.parts.replay import DiskTensors, in_memory
from am_diffusers.models.base import Model
from am_diffusers.rewards import Reward
from am_diffusers.run.load import encoder
from am_diffusers.run.methods.adjoint_matching import adjoint_matching
from am_diffusers.run.plan import Plan
from am_diffusers.system.processes import Processes


def buffered_adjoint_matching(
    plan: Plan, model: Model, reward: Reward, processes: Processes
) -> BufferedAdjointMatching:
    """Adjoint Matching on trajectories that are used again; on the disk they lie in the output folder."""
    config, options = plan.config, plan.config.buffer
    disk = DiskTensors(Path(config.run.output_dir))
    processes.on_main(disk.clean)
    return BufferedAdjointMatching(
        adjoint_matching(plan, model, reward, processes),
        encoder(config, model, config.method.rollout_guidance_scale),
        BufferSettings(options.buffer_size // config.optimizer.train_batch_size, options.buffer_refresh),
        disk if options.buffer_storage == "disk" else in_memory,
    )
