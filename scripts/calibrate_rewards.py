"""Measure mean and standard deviation of each reward on base images, and write a config to train with.

    accelerate launch scripts/calibrate_rewards.py --config configs/X.yaml --output rewards.yaml
    accelerate launch scripts/finetune.py --config configs/X.yaml --config rewards.yaml

A reward's weight then counts base standard deviations. All flags of `finetune.py` are understood; images
are made as in its evaluation: by the ODE sampler and `eval_guidance_scale`, on training prompts.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from am_diffusers.config import RewardConfig
from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.base_rewards import base_rewards
from am_diffusers.run.fields import guided
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import load_model, load_reward, make_sampler
from am_diffusers.run.plan import make_plan
from am_diffusers.system.files import write_text
from am_diffusers.system.processes import Processes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="YAML file to write")
    parser.add_argument("--num_prompts", type=int, default=64, help="number of training prompts to use")
    parser.add_argument("--images_per_prompt", type=int, default=4)
    options, rest = parser.parse_known_args()
    try:
        calibrate(rest, options.output, options.num_prompts, options.images_per_prompt)
    except ValueError as error:
        sys.exit(f"error: {error}")


def calibrate(argv: list[str], output: Path, num_prompts: int, images_per_prompt: int) -> None:
    """Measure the trained rewards of a config and write them with their mean and std."""
    if min(num_prompts, images_per_prompt) < 1 or num_prompts * images_per_prompt < 2:
        raise ValueError("--num_prompts and --images_per_prompt must be positive, for at least 2 images")
    config = parse_config(argv, program="calibrate_rewards.py")
    accelerator = make_accelerator(config)
    plan = make_plan(config, accelerator.num_processes)
    model = load_model(plan, accelerator.device)
    rewards = [load_reward(reward, config, accelerator.device) for reward in plan.config.method.rewards]
    base = guided(model.base, config.evaluation.eval_guidance_scale)
    sampler = make_sampler(config, model, purpose="calibration")
    prompts = plan.some_train_prompts(num_prompts, "calibration")
    processes = Processes(accelerator)
    with processes.together():
        scores = base_rewards(sampler, base, rewards, prompts, images_per_prompt, processes=processes)
    measured = []
    for reward in plan.config.method.rewards:
        mean, std = scores[reward.name].mean().item(), scores[reward.name].std().item()
        accelerator.print(
            f"{reward.name}: mean {mean:.6g}, std {std:.6g}, {scores[reward.name].numel()} images"
        )
        if not std > 0:
            raise ValueError(f"{reward.name} scores all base images {mean}: raise --num_prompts")
        measured.append(replace(reward, mean=mean, std=std))
    if accelerator.is_main_process:
        defaults = asdict(RewardConfig(""))
        rows = [{k: v for k, v in asdict(r).items() if v != defaults[k]} for r in measured]
        write_text(output, yaml.safe_dump({"rewards": rows}, sort_keys=False))
        accelerator.print(f"written: {output.resolve()}")


if __name__ == "__main__":
    main()
