"""Render prompts with a Stable Diffusion 3 pipeline and an optional LoRA: plain Diffusers, one PNG per image.

For example `python scripts/sample.py --model asset:tiny_sd3 --lora outputs/tiny_sd3 --resolution 64
--max_sequence_length 4 --prompts "an apple on a blue background" "a frog" --output pictures`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image, PngImagePlugin

from am_diffusers.models.base import Model, without_weights
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.prompts.rows import check_negative_prompt, check_unicode
from am_diffusers.prompts.sets import load_texts
from am_diffusers.system.commands import CommandParser
from am_diffusers.system.device import find_device
from am_diffusers.system.files import write_whole
from am_diffusers.system.paths import path_flag, place_flag
from am_diffusers.system.ranges import COUNT, GUIDANCE, NUMBER, SEED, STEPS
from am_diffusers.system.resolution import Resolution, resolution_flag

GRID, TEXT = "grid.png", "am_diffusers sample"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    options = parse()
    try:
        prompts = options.prompts or load_texts(options.prompt_file)
        check_unicode("--prompts", prompts)
        check_negative_prompt(options.negative_prompt, [options.guidance_scale])
        source = Pretrained(options.model, options.revision, options.variant)
        check_output(options, len(prompts))
        pipe = load(source, options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    images, seeds = [], range(options.seed, options.seed + options.num_images)
    for row, prompt in enumerate(prompts):
        made = pipe(
            prompt,
            negative_prompt=options.negative_prompt,
            num_images_per_prompt=options.num_images,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=options.num_inference_steps,
            height=options.resolution.height,
            width=options.resolution.width,
            **source.family.call(options.guidance_scale, options.max_sequence_length),
        ).images
        for seed, image in zip(seeds, made, strict=True):
            save(options.output / name_of(row, seed), image, prompt)
        images.extend(made)
    save(options.output / GRID, make_image_grid(images, len(prompts), options.num_images), "grid")
    print(f"{len(images)} images and grid.png: {options.output.resolve()}")


def parse() -> argparse.Namespace:
    parser = CommandParser("Render prompts with a pipeline and an optional LoRA.")
    parser.add_argument(
        "--model", type=place_flag, required=True, help="pipeline: folder, asset: path or hub id"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--variant", help="weight file variant, e.g. fp16")
    parser.add_argument("--lora", type=path_flag, help="LoRA: file or folder, also PEFT's; none = the base")
    parser.add_argument(
        "--lora_scale", type=NUMBER.read, default=1.0, help="strength of the LoRA; 0 = the base"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", help="one or more prompts")
    source.add_argument(
        "--prompt_file", type=place_flag, help="txt, json, jsonl, csv, tsv or parquet (column prompt)"
    )
    parser.add_argument("--output", type=path_flag, default=Path("pictures"), help="folder of the PNGs")
    parser.add_argument("--num_images", type=COUNT.read, default=1, help="images per prompt")
    parser.add_argument(
        "--seed", type=SEED.read, default=0, help="seed of a prompt's first image; then seed + 1"
    )
    parser.add_argument("--num_inference_steps", type=STEPS.read, default=28, help="denoising steps")
    parser.add_argument("--guidance_scale", type=GUIDANCE.read, default=1.0, help="guidance; 1.0 = off")
    parser.add_argument(
        "--negative_prompt", default="", help="text that guidance leads away from, as in training"
    )
    parser.add_argument(
        "--resolution",
        type=resolution_flag,
        default=Resolution(512, 512),
        help="side of the square images in pixels, or width x height: 832x480",
    )
    parser.add_argument(
        "--max_sequence_length", type=COUNT.read, default=256, help="T5 tokens, as in training"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    return parser.parse_args()


def name_of(row: int, seed: int) -> str:
    return f"{row:04d}-seed{seed}.png"


def check_output(options: argparse.Namespace, num_prompts: int) -> None:
    """Check that no image is replaced but those of an earlier call, which tell it in their text."""
    seeds = range(options.seed, options.seed + options.num_images)
    for name in [GRID, *(name_of(row, seed) for row in range(num_prompts) for seed in seeds)]:
        file = options.output / name
        if file.exists() and not is_own(file):
            raise ValueError(
                f"--output {options.output} holds {name}, which this would replace: choose another"
            )


def is_own(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return TEXT in image.info
    except OSError:
        return False


def save(file: Path, image: Image.Image, about: str) -> None:
    """Write a PNG with the text by which a later call knows it."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(TEXT, about)
    write_whole(file, lambda part: image.save(part, format="PNG", pnginfo=info))


def load(source: Pretrained, options: argparse.Namespace) -> Any:
    """Load the pipeline with its LoRA, on the GPU if there is one.

    Raises:
        ValueError: something doesn't fit or can't be used; says what to do.
    """
    device = find_device()
    source.family.check_length(options.max_sequence_length)
    source.family.latent_shape(source.config_of, options.resolution.height, options.resolution.width)
    if options.lora is not None:
        without_weights(source).load_lora(options.lora)
    model = Model.from_pretrained(source, weight_dtype=DTYPES[options.dtype], device=device)
    if options.lora is not None:
        model.load_lora(options.lora, scale=options.lora_scale)
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=None)
    return pipe


if __name__ == "__main__":
    main()
