"""The command line of `evaluate.py`."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from am_diffusers.rewards import REWARDS
from am_diffusers.system.commands import CommandParser
from am_diffusers.system.paths import path_flag, place_flag
from am_diffusers.system.ranges import COUNT, GUIDANCE, POSITIVE, SEED, STEPS
from am_diffusers.system.resolution import Resolution, resolution_flag
from am_diffusers.system.text import nearest


@dataclass(frozen=True)
class Options:
    """Options of the command line; `parser` explains each.

    Lists are never empty where one is needed, counts are positive, and `shard` is (which, of how many),
    counted from 0.
    """

    pretrained_model_name_or_path: str
    revision: str | None
    variant: str | None
    mixed_precision: str
    lora_path: list[str]
    lora_scale: list[float]
    num_inference_steps: list[int]
    guidance_scale: list[float]
    sampler: str
    resolution: Resolution | None
    max_sequence_length: int | None
    negative_prompt: str
    seed: int
    num_images_per_prompt: int
    batch_size: int
    prompts: str
    prompts_column: str | None
    category_columns: list[str] | None
    prompts_split: str | None
    max_prompts: int | None
    train_prompts: str | None
    rewards: list[str]
    features: list[str] | None
    reference_pictures: Path | None
    lpips: bool
    layouts: list[str]
    output_dir: Path
    shard: tuple[int, int]
    report_prompts: int


def parse(argv: Sequence[str]) -> Options:
    """Parse a command line.

    Raises:
        ValueError: an unknown flag (with the nearest known one) or a value that makes no sense.
        SystemExit: after `--help`, and for what argparse refuses.
    """
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        known = [f"--{field.name}" for field in fields(Options)]
        near = nearest(unknown[0], known)
        raise ValueError(f"unknown flag {unknown[0]}: did you mean {near}? (all flags: --help)")
    return Options(**vars(options))


def parser() -> argparse.ArgumentParser:
    """Make the parser, with flags in the order of `--help`."""
    known = CommandParser(
        "Compare LoRAs with their base: the same prompts and noise, real rewards, intervals.\n"
        "The same command again resumes where it was stopped."
    )
    _model_flags(known.add_argument_group("models"))
    _sampling_flags(known.add_argument_group("pictures"))
    _prompt_flags(known.add_argument_group("prompts"))
    _measure_flags(known.add_argument_group("what is measured"))
    _output_flags(known.add_argument_group("results"))
    return known


def _model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path",
        type=place_flag,
        required=True,
        help="base: Diffusers folder, asset: path or hub id",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--variant", help="weight file variant of the model, e.g. fp16")
    group.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="dtype of the transformer"
    )
    group.add_argument(
        "--lora_path",
        nargs="+",
        type=place_flag,
        default=[],
        metavar="[NAME=]PATH",
        help="one or more LoRAs: file, or folder of a run or checkpoint; none = the base alone is evaluated",
    )
    group.add_argument(
        "--lora_scale", nargs="+", type=POSITIVE.read, default=[1.0], help="strengths tried of each LoRA"
    )


def _sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num_inference_steps",
        nargs="+",
        type=STEPS.read,
        default=[28],
        help="denoising steps, each is tried",
    )
    group.add_argument(
        "--guidance_scale",
        nargs="+",
        type=GUIDANCE.read,
        default=[1.0],
        help="classifier-free guidance, each is tried; 1.0 = off",
    )
    group.add_argument(
        "--sampler",
        default="ode_euler",
        help="ode_euler; memoryless_local_linear, memoryless_euler or ancestral: the SDE of training, which "
        "gives the path KL too; or a scheduler class of Diffusers, e.g. FlowMatchHeunDiscreteScheduler",
    )
    group.add_argument(
        "--resolution",
        type=resolution_flag,
        help="side in pixels, or width x height: 832x480; default: the model's own",
    )
    group.add_argument(
        "--max_sequence_length",
        type=COUNT.read,
        help="T5 tokens, as in training; default: what the model's folder declares, else 256",
    )
    group.add_argument(
        "--negative_prompt", default="", help="text that guidance leads away from, as in training"
    )
    group.add_argument("--seed", type=SEED.read, default=0, help="all noise is a function of it")
    group.add_argument("--num_images_per_prompt", type=COUNT.read, default=4, help="images per prompt")
    group.add_argument("--batch_size", type=COUNT.read, default=16, help="images at a time, at most 16")


def _prompt_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        type=place_flag,
        required=True,
        help="txt, json, jsonl, csv, tsv or parquet file, data set folder, asset: path, hub id, or a preset: "
        "DrawBench, PartiPrompts, HPDv2, Pick-a-Pic, GenEval, ImageReward, tiny; NAME=FILE is your own copy",
    )
    group.add_argument("--prompts_column", help="column of the prompt; default: the usual names")
    group.add_argument(
        "--category_columns", nargs="*", help="columns to break results down by; default: the usual names"
    )
    group.add_argument("--prompts_split", help="split of a data set")
    group.add_argument("--max_prompts", type=COUNT.read, help="number of prompts to use, the first ones")
    group.add_argument(
        "--train_prompts",
        type=place_flag,
        help="training list to look for leaks in; default: the list of the LoRA's run, if known",
    )


def _measure_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rewards",
        nargs="+",
        type=place_flag,
        required=True,
        metavar="NAME[=MODEL]",
        help=f"{', '.join(REWARDS)}; MODEL: folder, file, asset: path or hub id; default: what the model's "
        "folder declares, else the released weights",
    )
    group.add_argument(
        "--features",
        nargs="*",
        type=place_flag,
        metavar="NAME[=MODEL]",
        help="image features for diversity and Frechet distances: dinov2, clip, efficientnet, dreamsim, or a "
        "reward with image features; default: the last such reward",
    )
    group.add_argument(
        "--reference_pictures", type=path_flag, help="folder of images to take Frechet distances to as well"
    )
    group.add_argument("--lpips", action="store_true", help="measure each image's change (package lpips)")


def _output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir", type=path_flag, required=True, help="folder of everything that is written"
    )
    group.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="this machine's share, counted from 0"
    )
    group.add_argument(
        "--layouts",
        nargs="+",
        choices=("geneval", "hpsv2"),
        default=[],
        help="write the images also in the folders of these judges",
    )
    group.add_argument(
        "--report_prompts", type=COUNT.read, default=100, help="number of prompts with images in the report"
    )


def shard(text: str) -> tuple[int, int]:
    """Parse `I/N`: shard I, from 0, of N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, e.g. 0/4, got {text}")
    return int(match[1]), int(match[2])


def named(text: str) -> tuple[str, str | None]:
    """Split `NAME=VALUE` into a pair; `NAME` alone has no value."""
    name, _, value = text.partition("=")
    return name, value or None
