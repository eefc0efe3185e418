"""Fine-tune a Stable Diffusion 3 pipeline on learned rewards.

    accelerate launch scripts/finetune.py --config configs/tiny_sd3.yaml [--flag value ...]

Plain `python scripts/finetune.py` works as well. `--help` lists every flag, `--dry_run` prints the plan.
The same command again resumes a run that was stopped or killed. SIGTERM, SIGINT and SIGUSR1 make it write a
checkpoint and leave with status 128 + the signal's number.
"""

import signal
import sys
import traceback
from pathlib import Path

from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate import describe
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.leftovers import ERROR_FILE, STOPPED_FILE, FolderError, leave_note
from am_diffusers.run.plan import Plan, make_plan
from am_diffusers.system.leaving import leaving_at_once
from am_diffusers.system.processes import disband, is_secondhand
from am_diffusers.system.signals import Interrupted, StopSignal
from am_diffusers.system.text import guard_output, redact


def main() -> None:
    guard_output()
    diffusers_logging.disable_progress_bar()  # would bury the plan and the one bar that matters
    transformers_logging.disable_progress_bar()
    try:
        config = parse_config(sys.argv[1:])
        accelerator = make_accelerator(config)
        plan = make_plan(config, accelerator.num_processes)
    except ValueError as error:
        sys.exit(redact(f"error: {error}"))
    if config.run.dry_run:
        if accelerator.is_main_process:
            print(plan.describe() + redact(describe(plan, accelerator)), end="")
        return
    tune(plan, accelerator)


def tune(plan: Plan, accelerator: Accelerator) -> None:
    """Execute the plan; an error leaves the program with a line that names it."""
    processes, folder = accelerator.num_processes, Path(plan.config.run.output_dir)
    stop = StopSignal()
    line = f"processes: {processes}, device: {accelerator.device}, output: {folder.resolve()}"
    accelerator.print(redact(line))
    try:
        run = build(plan, accelerator, stop)
        with stop.listening():
            evaluation = run.execute()
    except Interrupted as interrupted:
        accelerator.print(f"\n{interrupted}: run the same command again to resume")
        if accelerator.is_main_process:
            leave_note(folder, STOPPED_FILE, f"{interrupted}\n")
        disband()
        sys.exit(128 + (interrupted.number or signal.SIGTERM))
    except FolderError as error:  # nothing is written: the folder belongs to somebody else
        sys.exit(redact(f"error: {error}"))
    except Exception as error:
        if is_secondhand(error):
            sys.exit(redact(f"error: {error}"))
        details = redact(traceback.format_exc())
        note = leave_note(folder, ERROR_FILE, details)
        sys.exit(redact(f"error: {error}\n(details: {note})" if note else f"{details}\nerror: {error}"))
    accelerator.print(redact(f"\nfinished: LoRA, metrics and images are in {folder.resolve()}"))
    for line in evaluation.headline() if evaluation else []:
        accelerator.print(line)


if __name__ == "__main__":
    with leaving_at_once():
        main()
