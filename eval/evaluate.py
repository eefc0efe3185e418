"""Compare LoRAs with their base model: the same prompts and noise, real rewards, intervals, a report.

    python eval/evaluate.py --pretrained_model_name_or_path asset:tiny_sd3 --lora_path outputs/tiny_sd3
        --prompts tiny --rewards pickscore hpsv2 image_reward --output_dir outputs/evaluation

Also under `accelerate launch`, and on many machines with `--shard I/N` and a shared folder. The same command
again resumes where it was stopped; without `--shard` it does what is missing and writes the results.
"""

import sys

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from am_diffusers.system.failures import is_out_of_memory
from am_diffusers.system.joining import join
from am_diffusers.system.leaving import leaving_at_once
from am_diffusers.system.processes import Processes, disband
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
        accelerator = join()
        with stop.listening():
            for line in evaluate(plan, Processes(accelerator, stop)):
                accelerator.print(redact(line))
    except Interrupted as interrupted:
        print(f"\n{interrupted}: run the same command again to resume")
        disband()
        sys.exit(128 + interrupted.number)
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            sys.exit(f"error: out of memory: pass a smaller --batch_size; what was made is kept ({error})")
        if not isinstance(error, ValueError):
            raise
        sys.exit(redact(f"error: {error}"))


if __name__ == "__main__":
    with leaving_at_once():
        main()
