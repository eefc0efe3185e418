"""Checkpoints and how a run goes on."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Attributes:
        checkpointing_steps: iterations between two checkpoints; there is always one at the end, and when
            the run is stopped by SIGTERM, SIGINT or SIGUSR1.
        checkpoints_total_limit: checkpoints to keep, the oldest go first; null = all.
        resume_from_checkpoint: latest = the newest in output_dir that is sound, else a fresh start; or
            the path of a checkpoint.
        allow_config_change: go on though settings differ that change what is trained; they are shown. Rows
            that a method keeps (a buffer, grpo_passes) are dropped if reward, reward_scale, train_batch_size,
            the prompts or another setting that they were made with is among them; thresholds of the mask and
            other running means start anew if what is aimed at has changed.
        on_full_disk: stop the run when a checkpoint can't be written, or skip that checkpoint.
    """

    checkpointing_steps: int = 50
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str = "latest"
    allow_config_change: bool = False
    on_full_disk: Literal["stop", "skip"] = "stop"
