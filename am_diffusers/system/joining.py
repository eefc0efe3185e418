"""The start of every program: its device, and the processes that it works with."""

import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from am_diffusers.system.device import check_card, use_tf32

TIMEOUT = timedelta(minutes=30)
"""What an exchange of tensors may take before the process is ended.

They begin when all processes have told their status (`Processes`), so that this is no time in which one
loads, verifies or uploads: it ends processes that wait for the passes of one that failed (shard_weights)."""


def join(
    *,
    allow_tf32: bool = False,
    log_with: str | None = None,
    project_dir: Path | None = None,
    timeout: timedelta = TIMEOUT,
) -> Accelerator:
    """Return the processes and the device of a program.

    Args:
        allow_tf32: see `use_tf32`.
        log_with: tracker.
        project_dir: folder of the tracker's files.
        timeout: see `TIMEOUT`.

    Raises:
        ValueError: there is a card that CUDA can't use, or several processes were launched that don't know of
            each other: each would do all of the work, in the same folder.
    """
    check_card()
    use_tf32(allow_tf32)
    limit = InitProcessGroupKwargs(timeout=timeout)
    accelerator = Accelerator(log_with=log_with, project_dir=project_dir, kwargs_handlers=[limit])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}: "
            "on a CPU set ACCELERATE_USE_CPU=true"
        )
    return accelerator
