"""The command line of `optimize.py`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from am_diffusers.rewards import REWARDS
from am_diffusers.steering.ascent import STEP_SIZES, Optimized
from am_diffusers.steering.chain import GRADIENTS, Gradient
from am_diffusers.system.paths import path_flag, place_flag
from am_diffusers.system.ranges import COUNT, GUIDANCE, NUMBER, POSITIVE, SEED, STEPS
from am_diffusers.system.text import nearest


@dataclass(frozen=True)
class Options:
    """Options of the command line; `parser` explains each."""

    model: str
    revision: str | None
    variant: str | None
    lora: Path | None
    lora_scale: float
    dtype: str
    prompts: list[str] | None
    prompt_file: str | None
    output: Path
    num_images: int
    batch_size: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    resolution: int | None
    max_sequence_length: int | None
    rewards: list[str]
    weights: list[float] | None
    held_out_rewards: list[str]
    optimize: Optimized | None
    gradient: Gradient
    gradient_steps: int | None
    iterations: int
    step_size: float | None
    radius: float
    best_of: int | None
    sample: bool
    reward_scale: float
    chains: int
    chain_steps: int
    thin: int
    importance: int


def parse(argv: Sequence[str]) -> Options:
    """Parse a command line.

    Raises:
        ValueError: an unknown flag, with the nearest known one.
        SystemExit: after `--help`, and for what argparse refuses.
    """
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        near = nearest(unknown[0], [f"--{field.name}" for field in fields(Options)])
        raise ValueError(f"unknown flag {unknown[0]}: did you mean {near}? (all flags: --help)")
    return Options(**vars(options))


def parser() -> argparse.ArgumentParser:
    """Make the parser, with flags in the order of `--help`."""
    known = argparse.ArgumentParser(
        description="Better images of a frozen pipeline: a reward moves their noise or prompt embeddings.",
        allow_abbrev=False,
    )
    _model_flags(known.add_argument_group("model"))
    _image_flags(known.add_argument_group("images"))
    _reward_flags(known.add_argument_group("rewards"))
    _ascent_flags(known.add_argument_group("optimisation"))
    _tilt_flags(known.add_argument_group("sampling the tilted law"))
    return known


def _model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", type=place_flag, required=True, help="pipeline: folder, asset: path or hub id"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--variant", help="weight file variant, e.g. fp16")
    group.add_argument("--lora", type=path_flag, help="LoRA: file or folder, also PEFT's; none = the base")
    group.add_argument(
        "--lora_scale", type=NUMBER.read, default=1.0, help="strength of the LoRA; 0 = the base"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the weights; states and gradients are float32",
    )


def _image_flags(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", "--prompt", nargs="+", help="one or more prompts")
    source.add_argument(
        "--prompt_file", type=place_flag, help="txt, json, jsonl, csv, tsv or parquet (column prompt)"
    )
    group.add_argument("--output", type=path_flag, required=True, help="new folder of everything written")
    group.add_argument("--num_images", type=COUNT.read, default=1, help="images per prompt, each by itself")
    group.add_argument("--batch_size", type=COUNT.read, default=4, help="images of a prompt at a time")
    group.add_argument("--seed", type=SEED.read, default=0, help="all noise is a function of it")
    group.add_argument("--num_inference_steps", type=STEPS.read, default=28, help="denoising steps")
    group.add_argument("--guidance_scale", type=GUIDANCE.read, default=1.0, help="guidance; 1.0 = off")
    group.add_argument(
        "--sampler",
        default="ode_euler",
        help="ode_euler; memoryless_local_linear, memoryless_euler or ancestral, whose noise is frozen: they "
        "take embeddings only",
    )
    group.add_argument("--resolution", type=COUNT.read, help="side in pixels; default: the model's own")
    group.add_argument(
        "--max_sequence_length",
        type=COUNT.read,
        help="T5 tokens, as in training; default: what the model's folder declares, else 256",
    )


def _reward_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rewards",
        "--reward",
        nargs="+",
        type=place_flag,
        required=True,
        metavar="NAME[=MODEL]",
        help=f"{', '.join(REWARDS)}; MODEL: folder, file, asset: path or hub id; default: what the model's "
        "folder declares, else the released weights",
    )
    group.add_argument(
        "--weights", nargs="+", type=NUMBER.read, help="weight of each reward in the sum; default: 1"
    )
    group.add_argument(
        "--held_out_rewards",
        nargs="+",
        type=place_flag,
        default=[],
        metavar="NAME[=MODEL]",
        help="rewards that are only printed: does more than the number rise?",
    )


def _ascent_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--optimize", choices=get_args(Optimized), help="what the reward moves")
    group.add_argument(
        "--gradient",
        choices=GRADIENTS,
        default="exact",
        help="exact: of the sampler's steps; deis1, deis2: of its equation, to first and second order",
    )
    group.add_argument(
        "--gradient_steps", type=COUNT.read, help="steps of deis1 and deis2, fewer cost less; default: all"
    )
    group.add_argument("--iterations", type=COUNT.read, default=12, help="steps of the ascent")
    shown = ", ".join(f"{size:g} for {name}" for name, size in STEP_SIZES.items())
    group.add_argument(
        "--step_size", type=POSITIVE.read, help=f"relative to the start's norm; default: {shown}"
    )
    group.add_argument(
        "--radius", type=POSITIVE.read, default=0.3, help="how far embeddings may go, relative to their norm"
    )
    group.add_argument(
        "--best_of", type=COUNT.read, help="also the best of this many noises of each image, as a baseline"
    )


def _tilt_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sample",
        action="store_true",
        help="draw noise from N(0, I) * exp(reward_scale * reward) instead: a right law, not a best image",
    )
    group.add_argument("--reward_scale", type=POSITIVE.read, default=1.0, help="lambda of that law")
    group.add_argument("--chains", type=COUNT.read, default=4, help="Markov chains of a prompt")
    group.add_argument(
        "--chain_steps", type=COUNT.read, default=60, help="steps after as many of burn-in, at least 8"
    )
    group.add_argument("--thin", type=COUNT.read, default=15, help="write the image of every so many steps")
    group.add_argument(
        "--importance", type=COUNT.read, default=64, help="base noises of the check by importance sampling"
    )
