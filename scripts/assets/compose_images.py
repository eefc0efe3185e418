"""Real images of captions, drawn as the tiny pipeline's training data are, all of them clean.

    python scripts/assets/compose_images.py --prompts asset:prompts/eval.txt --output_dir outputs/real

For `eval/evaluate.py --reference_pictures`. A caption reads `a fox on a blue background`; the place is
random. The files are named as those of evaluate.py: prompt 12, image 3 is 00012-003.png.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import PngImagePlugin
from pretrain.world import Labels, World

from am_diffusers.evaluation.grids import to_pil
from am_diffusers.prompts.sets import load_texts
from am_diffusers.system.files import asset_path
from am_diffusers.system.paths import path_flag, place_flag
from am_diffusers.system.text import nearest

SPRITES = "asset:world/sprites.parquet"


def labels_of(world: World, captions: Sequence[str]) -> Labels:
    """Find the labels whose full captions these are.

    Raises:
        ValueError: one is no such caption; names the nearest.
    """
    every = world.labels(world.combinations)
    place = {caption: row for row, caption in enumerate(world.captions(every))}
    for number, caption in enumerate(captions, start=1):
        if caption not in place:
            near = nearest(caption, place)
            raise ValueError(f"{caption!r} (prompt {number}) is no caption of the world: {near!r} is")
    return every.index(torch.tensor([place[caption] for caption in captions]))


def compose(options: argparse.Namespace) -> int:
    """Write the images, all of them or none; their number.

    Raises:
        ValueError: a caption isn't one of the world, or the folder isn't empty.
        OSError: they can't be written.
    """
    world, captions = World(Path(asset_path(SPRITES))), load_texts(options.prompts)
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        raise ValueError(f"--output_dir {options.output_dir} is not empty: choose another folder")
    if options.num_images_per_prompt < 1:
        raise ValueError(f"--num_images_per_prompt {options.num_images_per_prompt}: expected at least 1")
    labels, generator = labels_of(world, captions), torch.Generator().manual_seed(options.seed)
    options.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output_dir.parent) as part:
        folder = Path(part) / "images"
        folder.mkdir()
        for number in range(options.num_images_per_prompt):
            for prompt, image in enumerate(world.images(labels, generator)):
                about = PngImagePlugin.PngInfo()  # as evaluate.py's images have it
                about.add_itxt("am_diffusers", json.dumps({"prompt": captions[prompt], "candidate": "real"}))
                to_pil(image).save(folder / f"{prompt:05d}-{number:03d}.png", pnginfo=about)
        folder.replace(options.output_dir)
    return len(captions) * options.num_images_per_prompt


def main() -> None:
    """Compose images as the command line asks."""
    options = _parse()
    try:
        number = compose(options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{number} images in {options.output_dir}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=place_flag, required=True, help="text file of captions, or an asset: path"
    )
    parser.add_argument("--output_dir", type=path_flag, required=True, help="new or empty folder")
    parser.add_argument("--num_images_per_prompt", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
