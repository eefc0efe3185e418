"""Compare LoRAs with their base model: the same prompts and noise, real rewards, intervals, a report.

    python eval/evaluate.py --pretrained_model_name_or_path asset:tiny_sd3 --lora_path outputs/tiny_sd3
        --prompts tiny --rewards pickscore hpsv2 image_reward --output_dir outputs/evaluation

Also under `accelerate launch`, and on many machines with `--shard I/N` and a shared folder. The same command
again resumes where it was stopped; without `--shard` it does what is missing and writes the results.
"""

import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from am_diffusers.system.leaving import leaving_at_once
from am_diffusers.system.processes import Processes, check_joined
from am_diffusers.system.signals import Interrupted, StopSignal
from am_diffusers.system.text import guard_output, redact
from evaluating.driver import evaluate
from evaluating.options import parse
from evaluating.plan import make_plan


def main() -> None:
    """Plan, evaluate, say where the report is."""
    guard_output()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # the notes say once which prompts are cut off
    transformers_logging.disable_progress_bar()
    stop = StopSignal()
    try:
        plan = make_plan(parse(sys.argv[1:]))
        # Processes that are done wait for the slowest: no reason to end the job.
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
        check_joined(accelerator)
        with stop.listening():
            for line in evaluate(plan, Processes(accelerator, stop)):
                accelerator.print(redact(line))
    except Interrupted as interrupted:
        print(f"\n{interrupted}: run the same command again to resume")
        sys.exit(128 + interrupted.number)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory: pass a smaller --batch_size; what was made is kept ({error})")
    except ValueError as error:
        sys.exit(redact(f"error: {error}"))


if __name__ == "__main__":
    with leaving_at_once():
        main()
