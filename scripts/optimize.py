"""Better images of a frozen pipeline: a reward moves their noise or their prompt embeddings.

    python scripts/optimize.py --model asset:tiny_sd3 --prompt "a frog on a red background" --reward pickscore
        --held_out_rewards hpsv2 --optimize noise --num_inference_steps 10 --best_of 36 --output better

Writes images and what they start from, which a plain Diffusers call takes. `--sample` draws noise from the
law tilted by the reward instead. docs/optimize.md says when which is worth it.
"""

import sys

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from am_diffusers.steering.driver import load, optimize
from am_diffusers.steering.options import parse
from am_diffusers.steering.plan import make_plan
from am_diffusers.steering.tilt import sample_tilt
from am_diffusers.system.device import find_device
from am_diffusers.system.failures import is_out_of_memory
from am_diffusers.system.text import guard_output, redact


def main() -> None:
    """Plan, load, optimise or sample."""
    guard_output()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        plan = make_plan(parse(sys.argv[1:]))
        shop = load(plan, find_device())
        for line in sample_tilt(shop) if plan.options.sample else optimize(shop):
            print(redact(line))
    except ValueError as error:
        sys.exit(redact(f"error: {error}"))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: out of memory: pass a smaller --batch_size or --dtype bfloat16 ({error})")


if __name__ == "__main__":
    main()
