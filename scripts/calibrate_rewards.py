"""Score base images: calibrate the rewards of a config, and show what each reward_scale is worth.

    accelerate launch scripts/calibrate_rewards.py --config configs/X.yaml --output calibrated.yaml
    accelerate launch scripts/finetune.py --config configs/X.yaml --config calibrated.yaml

Writes the rewards with mean and standard deviation, so that a weight counts base standard deviations, and
beside it the scores, from which `--reward_scale auto --target_kl 0.5` takes the scale whose tilt differs from
the base by half a nat. Prints the frontier: for some KL divergences the reward_scale, the gain of the
tilt in trained and held-out rewards, and what the best of as many base images as cost the same KL would gain.
All flags of `finetune.py` are understood; images are made as in training, by its chain, on training prompts.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from torch import Tensor

from am_diffusers.config import Config, RewardConfig
from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.frontier_table import frontier_table
from am_diffusers.evaluation.pairs import official
from am_diffusers.evaluation.scores import save_scores, score_images
from am_diffusers.run.base_scores import trained_scales
from am_diffusers.run.certificate import chain_sampler
from am_diffusers.run.fields import with_guidance
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.load import load_model, load_rewards
from am_diffusers.run.plan import make_plan
from am_diffusers.system.commands import CommandParser
from am_diffusers.system.files import read_utf8, write_text
from am_diffusers.system.leaving import leaving_at_once
from am_diffusers.system.paths import path_flag
from am_diffusers.system.processes import Processes
from am_diffusers.system.ranges import COUNT


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=path_flag, required=True, help="YAML file to write")
    parser.add_argument(
        "--num_prompts", type=COUNT.read, default=32, help="number of training prompts to use"
    )
    parser.add_argument(
        "--images_per_prompt", type=COUNT.read, default=64, help="at least 8, to tell the frontier"
    )
    options, rest = parser.parse_known_args()
    try:
        calibrate(rest, options.output, options.num_prompts, options.images_per_prompt)
    except ValueError as error:
        sys.exit(f"error: {error}")


def calibrate(argv: list[str], output: Path, num_prompts: int, images_per_prompt: int) -> None:
    """Score base images; write the calibrated rewards and the scores, print the frontier."""
    if images_per_prompt < 8:
        raise ValueError(f"--images_per_prompt must be at least 8, got {images_per_prompt}")
    _check_output(output)
    config = parse_config(argv, program="calibrate_rewards.py")
    accelerator = make_accelerator(config)
    plan = make_plan(config, accelerator.num_processes)
    model = load_model(plan, accelerator.device)
    trained, held_out = load_rewards(plan, accelerator.device)
    prompts, processes = plan.some_train_prompts(num_prompts, "calibration"), Processes(accelerator)
    with processes.together():
        scores = score_images(
            chain_sampler(plan.config, model, "calibration"),
            with_guidance(plan.config, model.policy, model.base).base,
            [*trained, *map(official, held_out)],
            prompts,
            images_per_prompt,
            processes=processes,
        )
    calibrated = _calibrated(plan.config, scores)
    for reward in calibrated.method.rewards:
        number = scores[reward.name].numel()
        accelerator.print(f"{reward.name}: mean {reward.mean:.6g}, std {reward.std:.6g}, {number} images")
    if accelerator.is_main_process:
        _write(output, calibrated, prompts, scores)
    scales = trained_scales(calibrated)
    for line in frontier_table(Frontier.of(scores, scales), list(scales)):
        accelerator.print(line)


def _check_output(output: Path) -> None:
    """Check that nothing but an earlier calibration would be replaced."""
    for file, keys in ((output, {"rewards", "frontier"}), (_frontier_of(output), {"prompts", "scores"})):
        if file.exists() and _keys(file) != keys:
            raise ValueError(
                f"--output {output} would replace {file}, which is no calibration: choose another name"
            )


def _keys(file: Path) -> set[str]:
    """Return the keys of a YAML or JSON file; none if it is something else."""
    try:
        document = yaml.safe_load(read_utf8(file))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return set(document) if isinstance(document, dict) else set()


def _frontier_of(output: Path) -> Path:
    return output.with_suffix(".frontier.json")


def _calibrated(config: Config, scores: Mapping[str, Tensor]) -> Config:
    """Return the config with mean and standard deviation of each trained reward."""
    rewards = []
    for reward in config.method.rewards:
        mean, std = scores[reward.name].mean().item(), scores[reward.name].std().item()
        if not std > 0:
            raise ValueError(f"{reward.name} scores all base images {mean}: raise --num_prompts")
        rewards.append(replace(reward, mean=mean, std=std))
    return replace(config, method=replace(config.method, rewards=rewards))


def _write(output: Path, config: Config, prompts: list[str], scores: Mapping[str, Tensor]) -> None:
    frontier, defaults = _frontier_of(output).resolve(), asdict(RewardConfig(""))
    rows = [{k: v for k, v in asdict(r).items() if v != defaults[k]} for r in config.method.rewards]
    save_scores(frontier, prompts, scores)
    write_text(output, yaml.safe_dump({"rewards": rows, "frontier": str(frontier)}, sort_keys=False))
    print(f"written: {output.resolve()} and {frontier}")


if __name__ == "__main__":
    with leaving_at_once():
        main()
