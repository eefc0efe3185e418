"""The buffer of past trajectories."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BufferConfig:
    """The buffer of past trajectories.

    Attributes:
        buffer_size: samples that are kept, over all processes: a multiple of train_batch_size; the oldest go
            first.
        buffer_refresh: iterations from one rollout to the next; how often a row is trained on, on average.
        buffer_storage: where latents and targets are kept: cpu (main memory), or disk (files in output_dir,
            mapped into memory).
        buffer_max_gb: largest size of the buffer over all processes, in GiB; it is as large in a checkpoint.
    """

    buffer_size: int = 64
    buffer_refresh: int = 4
    buffer_storage: Literal["cpu", "disk"] = "cpu"
    buffer_max_gb: float = 8.0
