"""Runs of the finetune script by joined processes, one of which fails at a given point of each run.

    accelerate launch ... failing_runs.py FOLDER CONFIG.yaml

How each process left each run is written to FOLDER/INDEX.json: the last line of its message, and the seconds.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from am_diffusers.evaluation.images import Sampler
from am_diffusers.evaluation.pairs import Scorer
from am_diffusers.rewards import PickScore
from am_diffusers.run.execution import Run
from am_diffusers.system.leaving import leaving_at_once
from finetune_runs import FINETUNE


def failing(process: int) -> Callable[..., None]:
    """A function that fails on one process; on the others it makes nothing."""

    def fail(*args: object, **options: object) -> None:
        if int(os.environ["RANK"]) == process:
            raise ArithmeticError("on purpose")

    return fail


def around(owner: type, name: str, process: int, *, purpose: str = ""):
    """Let a method fail on one process before it works (of samplers: those of a purpose)."""
    original, fail = getattr(owner, name), failing(process)

    def method(self, *args, **options):
        if not purpose or self.purpose == purpose:
            fail()
        return original(self, *args, **options)

    return mock.patch.object(owner, name, method)


def part(name: str, process: int = 0):
    """Let a part of the finished `Run` fail."""
    execute = Run.execute
    return mock.patch.object(Run, "execute", lambda self: execute(replace(self, **{name: failing(process)})))


POINTS = {
    "loading": lambda: mock.patch.object(PickScore, "from_pretrained", failing(1)),
    "computing base rewards": lambda: around(Sampler, "sample", 1, purpose="divergence"),
    "exporting": lambda: part("save_lora"),
    "verifying": lambda: part("verify_lora"),
    "scoring": lambda: around(Scorer, "pairs", 1),
    "uploading": lambda: part("share"),
}
"""Where a run fails, and on which process (0 unless it is said)."""
FAILING = {name: int(name in ("loading", "computing base rewards", "scoring")) for name in POINTS}


def leave(config: str, output: str) -> list[object]:
    sys.argv = [str(FINETUNE), "--config", config, "--output_dir", output]
    started, message = time.monotonic(), "finished"
    try:
        runpy.run_path(str(FINETUNE))["main"]()
    except SystemExit as error:
        message = str(error)
    return [message, time.monotonic() - started]


def main() -> None:
    folder, config = Path(sys.argv[1]), sys.argv[2]
    left = {}
    for name, patch in POINTS.items():
        with patch():
            left[name] = leave(config, str(folder / name.replace(" ", "_")))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(left))


if __name__ == "__main__":
    with leaving_at_once():
        main()
