"""Measure what optimised noise and embeddings gain, against the best of n noises at equal network passes.

    python scripts/docs/steering_record.py --output docs/optimize.json

Runs `optimize.py`'s own code on the embedded pipeline: each target by each gradient, the best of as many
noises as cost the passes of the exact ascent, then the tilted law of some prompts at some scales. For a try:
`--num_prompts 2 --num_images 1 --tilt_prompts 1`. Gains are printed as Markdown tables.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from am_diffusers.prompts.sets import load_texts
from am_diffusers.steering.driver import Workshop, load, optimize
from am_diffusers.steering.options import parse
from am_diffusers.steering.plan import make_plan
from am_diffusers.steering.results import RESULTS, Folder
from am_diffusers.steering.tilt import sample_tilt
from am_diffusers.system.files import write_json
from am_diffusers.system.paths import path_flag
from am_diffusers.system.ranges import COUNT, POSITIVE, STEPS

TARGETS = ("noise", "embeddings")
GRADIENTS = (("exact", ()), ("deis1", ("--gradient_steps", "5")), ("deis2", ("--gradient_steps", "5")))
PROMPTS = "asset:prompts/eval.txt"


def main() -> None:
    """Measure and write the record."""
    options = _parser().parse_args()
    prompts = load_texts(PROMPTS)
    # Spread over the list: neighbours are alike.
    some = prompts[:: max(1, len(prompts) // options.num_prompts)][: options.num_prompts]
    record: dict[str, object] = {"threads": torch.get_num_threads(), "prompts": some}
    shop: Workshop | None = None
    with TemporaryDirectory() as scratch:
        for number, (target, (gradient, more)) in enumerate(
            tqdm([*product(TARGETS, GRADIENTS)], desc="methods")
        ):
            folder = Path(scratch) / f"{target}-{gradient}"
            passes_of_exact = 3 * options.iterations + 1
            baseline = ["--best_of", str(passes_of_exact)] if number == 0 else []
            flags = ["--optimize", target, "--gradient", gradient, *more, *baseline]
            shop = _shop(shop, [*_shared(options, some), *flags, "--output", str(folder)])
            print("\n".join(optimize(shop)))
            record[f"{target}-{gradient}"] = json.loads((folder / RESULTS).read_text())["candidates"]
        for scale in options.scales:
            folder = Path(scratch) / f"tilt-{scale:g}"
            flags = ["--sample", "--reward_scale", str(scale), "--chain_steps", str(options.chain_steps)]
            flags += ["--importance", str(options.importance), "--thin", str(options.chain_steps)]
            tilted = some[: options.tilt_prompts]
            shop = _shop(shop, [*_shared(options, tilted), *flags, "--output", str(folder)])
            print("\n".join(sample_tilt(shop)))
            record[f"tilt-{scale:g}"] = json.loads((folder / RESULTS).read_text())["candidates"]
    write_json(options.output, record)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure what optimised noise and embeddings gain.")
    parser.add_argument("--output", type=path_flag, required=True, help="JSON file to write")
    parser.add_argument("--num_prompts", type=COUNT.read, default=16, help="evaluation prompts")
    parser.add_argument("--num_images", type=COUNT.read, default=3, help="noises of each")
    parser.add_argument(
        "--num_inference_steps", type=STEPS.read, default=10, help="denoising steps, at least 5"
    )
    parser.add_argument("--iterations", type=COUNT.read, default=12, help="steps of each ascent")
    parser.add_argument("--tilt_prompts", type=COUNT.read, default=4, help="prompts of the tilted law")
    parser.add_argument("--scales", nargs="+", type=POSITIVE.read, default=[0.5, 1.0], help="its scales")
    parser.add_argument("--chain_steps", type=COUNT.read, default=60, help="steps of its chains")
    parser.add_argument("--importance", type=COUNT.read, default=200, help="base noises of its check")
    return parser


def _shared(options: argparse.Namespace, prompts: Sequence[str]) -> list[str]:
    flags = ["--model", "asset:tiny_sd3", "--prompts", *prompts, "--rewards", "pickscore"]
    flags += ["--held_out_rewards", "hpsv2", "image_reward", "world_clean", "world_right"]
    flags += ["--num_images", str(options.num_images), "--batch_size", str(options.num_images)]
    return [
        *flags,
        *("--num_inference_steps", str(options.num_inference_steps), "--iterations", str(options.iterations)),
    ]


def _shop(shop: Workshop | None, flags: Sequence[str]) -> Workshop:
    """Return the loaded parts for another command line of the same models."""
    plan = make_plan(parse(flags))
    if shop is None:
        return load(plan, torch.device("cpu"))
    folder = Folder(plan.options.output, plan.options.num_inference_steps, plan.options.guidance_scale)
    return replace(shop, plan=plan, folder=folder)


if __name__ == "__main__":
    main()
