"""Growth of this process by a training iteration, in bytes: `python memory_run.py small.yaml large.yaml`.

The small run comes first and is dropped: what it leaves behind (modules imported late, kernels' caches,
threads) belongs to no model. Blocks of 64 KiB and more must go back to the system when they are freed, see
`MALLOC_MMAP_THRESHOLD_` in `test_estimate_memory.py`, for the peak to be one of live memory.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from am_diffusers.config.command_line import parse_config
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan


def resident(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def iterate(config_file: str) -> dict[str, int]:
    """Peak after two iterations, and the weights' share of it."""
    config = parse_config(["--config", config_file])
    accelerator = make_accelerator(config)
    run = build(make_plan(config, 1), accelerator)
    collect()
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(2):
        run.trainer.iterate()
        run.trainer.state.progress.iteration += 1
    return {"loaded": loaded, "peak": resident("VmHWM")}


def collect() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    torch.set_num_threads(1)
    small, large = sys.argv[1:]
    iterate(small)
    collect()
    before = resident("VmRSS")
    measured = iterate(large)
    sys.stdout.write(json.dumps({name: size - before for name, size in measured.items()}) + "\n")


if __name__ == "__main__":
    main()
