"""Two joined processes, one of which fails at a point of a run; for tests/system/test_failing_processes.py.

    accelerate launch ... failing_processes.py FOLDER

The points are those of the package, on fields in closed form. What each process left with is written to
FOLDER/INDEX.json. Exchanges of tensors time out after 10 s, which other waiting does not.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from am_diffusers.evaluation.held_out import HeldOut
from am_diffusers.evaluation.scores import score_images
from am_diffusers.evaluation.validation import Validation
from am_diffusers.rewards import Brightness
from am_diffusers.run.execution import Run
from am_diffusers.system.joining import join
from am_diffusers.system.leaving import leaving_at_once
from am_diffusers.system.processes import Processes, disband
from analytic_pictures import PROMPTS, field, make_sampler, make_scorer

MESSAGE = "on purpose"
Fail = Callable[[], None]


class Broken(Brightness):
    """A reward that fails on one process, in its second batch."""

    def __init__(self, fail: Fail) -> None:
        super().__init__()
        self.fail, self.calls = fail, 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls > 1:
            self.fail()
        return super().__call__(images, prompts)


def computing_base_rewards(processes: Processes, fail: Fail) -> None:
    with processes.together():
        score_images(make_sampler(2), field(0.0), [Broken(fail)], PROMPTS, 4, processes=processes)


def scoring(processes: Processes, fail: Fail) -> None:
    held_out = HeldOut(make_scorer(2, [Broken(fail)]), PROMPTS, 4, {"brightness": "trained"})
    make_run(processes, held_out=held_out).execute()


def validating(processes: Processes, fail: Fail) -> None:
    with processes.together():
        make_validation(processes, [Broken(fail)], None)(0)


def logging_a_validation(processes: Processes, fail: Fail) -> None:
    def log(*_) -> None:
        fail()

    with processes.together():
        make_validation(processes, [Brightness()], log if processes.is_main else None)(0)


def exporting(processes: Processes, fail: Fail) -> None:
    make_run(processes, save_lora=lambda folder: fail()).execute()


def verifying(processes: Processes, fail: Fail) -> None:
    make_run(processes, verify_lora=lambda file: fail()).execute()


def uploading(processes: Processes, fail: Fail) -> None:
    make_run(processes, share=lambda evaluation: fail()).execute()


def loading_in_a_nested_block(processes: Processes, fail: Fail) -> None:
    with processes.together():
        with processes.together():
            if not processes.is_main:
                fail()
        processes.from_main(list)


ON_MAIN = [logging_a_validation, exporting, verifying, uploading]
ON_ANY = [computing_base_rewards, scoring, validating]
ON_THE_OTHER = [loading_in_a_nested_block]
CASES = [
    *((point, 0) for point in [*ON_MAIN, *ON_ANY]),
    *((point, 1) for point in [*ON_ANY, *ON_THE_OTHER]),
]
"""Points of a run, and the process that fails there."""


def make_run(processes: Processes, **changes) -> Run:
    state = SimpleNamespace(ema_weights=nullcontext)
    parts = {
        "trainer": SimpleNamespace(train=lambda: None, state=state),
        "save_lora": lambda folder: [folder / "lora"],
        "verify_lora": lambda file: {},
        "held_out": None,
        "share": lambda evaluation: None,
        "folder": Path(sys.argv[1]),
        "lock": None,
    }
    return Run(processes=processes, **(parts | changes))


def make_validation(processes: Processes, rewards, log) -> Validation:
    scorer = make_scorer(2, rewards)
    roles = {"brightness": "trained"}
    return Validation(scorer, PROMPTS, 2, 4, roles=roles, processes=processes, log=log)


def left_with(processes: Processes, point: Callable[[Processes, Fail], None], failing: int) -> list[object]:
    """Name and message of what `point` ended with on this process, and the seconds that it took."""

    def fail() -> None:
        if processes.index == failing:
            raise ArithmeticError(MESSAGE)

    started, name, message = time.monotonic(), "nothing", ""
    try:
        point(processes, fail)
    except Exception as error:
        name, message = type(error).__name__, str(error)
    return [name, message, time.monotonic() - started]


def main() -> None:
    processes = Processes(join(timeout=timedelta(seconds=10)))
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options  # pyright: ignore
    document: dict[str, object] = {
        "objects": processes.gather_objects([(processes.index, i) for i in range(processes.index + 1)]),
        "from_main": processes.from_main(lambda: {"process": processes.index}),
        "on_main": processes.on_main(lambda: processes.index),
        "timeout": options._timeout.total_seconds(),
        "uploaded": processes.from_main(lambda: time.sleep(12) or "uploaded"),
        "sums": processes.sum_numbers({"bytes": 2**40 + processes.index, "loss": 0.25}),
    }
    for point, failing in CASES:
        document[f"{point.__name__}-{failing}"] = left_with(processes, point, failing)
    disband()
    document["joined"] = dist.is_initialized()
    (Path(sys.argv[1]) / f"{processes.index}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    with leaving_at_once():
        main()
