"""Scores of base images of the embedded pipeline, written for the tests of the evaluation's statistics.

    python scripts/assets/score_bank.py --output tests/data/score_bank.json

All embedded held-out prompts, a bank of images each, in the published mode of the embedded rewards. The
tests resample it: two draws of images of the same base must seldom differ significantly.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.pairs import official
from am_diffusers.evaluation.scores import score_images
from am_diffusers.run.load import load_model, load_rewards, make_sampler
from am_diffusers.run.plan import make_plan
from am_diffusers.system.paths import path_flag
from am_diffusers.system.processes import Processes

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_sd3.yaml"
STEPS = 10
DIGITS = 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=path_flag, required=True, help="JSON file to write")
    parser.add_argument("--images_per_prompt", type=int, default=12)
    args = parser.parse_args()
    config = parse_config(["--config", str(CONFIG), "--eval_inference_steps", str(STEPS)])
    plan = make_plan(config, 1)
    accelerator = Accelerator(cpu=True)
    model = load_model(plan, accelerator.device)
    rewards = [official(reward) for group in load_rewards(plan, accelerator.device) for reward in group]
    sampler = make_sampler(config, model, purpose="score bank")
    scores = score_images(
        sampler,
        model.base,
        rewards,
        plan.eval_prompts,
        args.images_per_prompt,
        processes=Processes(accelerator),
    )
    document = {
        "command": "python scripts/assets/score_bank.py --output tests/data/score_bank.json",
        "torch": torch.__version__,
        "num_inference_steps": STEPS,
        "scores": {
            name: [[float(f"{score:.{DIGITS}g}") for score in row] for row in table.tolist()]
            for name, table in scores.items()
        },
    }
    args.output.write_text(json.dumps(document, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
