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
        buffer_max_gb: most that the buffer may hold over all processes, in GiB: buffer_size samples, which
            are in every checkpoint, the train_batch_size that fall out while an iteration lasts, and twice
            as many for the rows that are drawn, always in main memory.
    """

    buffer_size: int = 64
    buffer_refresh: int = 4
    buffer_storage: Literal["cpu", "disk"] = "cpu"
    buffer_max_gb: float = 8.0
