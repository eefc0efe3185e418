"""Turn a trained LoRA into a file or folder for other programs, and prove it by loading it back.

    python scripts/export_lora.py --model asset:tiny_sd3 --lora_path outputs/tiny_sd3 --format comfyui \
        --output fox.safetensors

`diffusers` and `comfyui` write a safetensors file, `merged` a pipeline folder that needs no LoRA.
"""

import argparse
import sys

import torch
from diffusers.utils import logging as diffusers_logging

from am_diffusers.models.export import FORMS, ExportOptions, export_lora
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.system.commands import CommandParser
from am_diffusers.system.paths import path_flag, place_flag
from am_diffusers.system.ranges import NUMBER
from am_diffusers.system.text import guard_output, redact

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    guard_output()
    options = parse()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # it warns that text encoders have no LoRA, as is right
    try:
        base = Pretrained(options.model, options.revision, options.variant)
        what = ExportOptions(options.lora_path, options.scale, DTYPES[options.dtype])
        proof = export_lora(base, what, options.output, options.format)
    except ValueError as error:
        sys.exit(redact(f"error: {error}"))
    print(redact(f"{options.format}: {options.output.resolve()}"))
    print(
        f"loaded back: the LoRA changes the velocity by {proof.effect:.2g} of its size, the export does the "
        f"same up to {proof.error:.1g} of that change"
    )


def parse() -> argparse.Namespace:
    parser = CommandParser("Export a LoRA and prove the export by loading it back.")
    parser.add_argument(
        "--model", type=place_flag, required=True, help="base pipeline: folder, asset: path or hub id"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--variant", help="weight file variant, e.g. fp16")
    parser.add_argument(
        "--lora_path", type=path_flag, required=True, help="LoRA: file or folder, also PEFT's"
    )
    parser.add_argument("--format", choices=FORMS, required=True, help="what to write")
    parser.add_argument(
        "--output", type=path_flag, required=True, help="file or folder to write; must not exist"
    )
    parser.add_argument("--scale", type=NUMBER.read, default=1.0, help="strength of the LoRA; 1 = as trained")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of a merged pipeline, to load it with"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
