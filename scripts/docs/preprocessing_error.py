"""Measure the error of the differentiable preprocessing of rewards against the published one, on images.

    python scripts/docs/preprocessing_error.py --output docs/preprocessing_error.json

For every embedded reward model and every reward whose weights a package ships: root mean square of
`score(mode) - score("official")` over the standard deviation of the official score between images. Each
image is scored for its own prompt. Images are those of the embedded pipeline for its held-out prompts, as
decoded and enlarged, so that towers for 64 pixels have to resize; for the OCR reward they are drawn words.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from doc_tables import write_results
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_tensor

from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.images import image_ids
from am_diffusers.rewards import OCR, OFFICIAL, REWARDS, ImageNetClass, LearnedReward, RewardOptions
from am_diffusers.rewards.base import Mode
from am_diffusers.rewards.parts.preprocess import bicubic
from am_diffusers.run.load import load_model, make_sampler
from am_diffusers.run.plan import make_plan
from am_diffusers.system.files import asset_path
from am_diffusers.system.paths import path_flag

ROOT = Path(__file__).parents[2]
TARGETS: dict[Mode, float] = {"rounded": 0.02, "differentiable": 0.05}


def embedded() -> dict[type[LearnedReward], str]:
    """Return the rewards of which the package ships a small model, and their folders."""
    folders = sorted(Path(asset_path("asset:.")).glob("tiny_*"))
    names = [folder.name.removeprefix("tiny_") for folder in folders]
    kinds = {name: REWARDS[name] for name in names if name in REWARDS}
    return {
        kind: asset_path(f"asset:tiny_{n}") for n, kind in kinds.items() if issubclass(kind, LearnedReward)
    }


def decoded(seed: int) -> tuple[Tensor, list[str]]:
    """Make an image (64 x 64) of the embedded pipeline for each of its held-out prompts."""
    config = parse_config(["--config", str(ROOT / "configs" / "tiny_sd3.yaml"), "--seed", str(seed)])
    plan = make_plan(config, 1)
    model = load_model(plan, torch.device("cpu"))
    sampler = make_sampler(config, model, purpose="preprocessing")
    prompts = list(plan.eval_prompts)
    return sampler.images(model.base, prompts, image_ids(len(prompts), 1)), prompts


def enlarged(images: Tensor) -> dict[str, Tensor]:
    """Enlarge images to several sizes; the last with the hard edges that bicubic resizing overshoots at."""
    return {
        "64 px, as decoded": images,
        "128 px, bicubic": bicubic(images, 128, 128).clamp(0, 1),
        "160 px, bicubic": bicubic(images, 160, 160).clamp(0, 1),
        "160 px, nearest": interpolate(images, (160, 160), mode="nearest"),
    }


def words(prompts: Sequence[str], seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """Draw the first words of prompts with Pillow's font in random colours; prompts quote them."""
    texts = [prompt.split(" on ")[0] for prompt in prompts]
    sizes = {"48 x 320 px": (48, 320), "64 x 384 px": (64, 384), "120 x 640 px": (120, 640)}
    drawn = {}
    for name, size in sizes.items():
        generator = torch.Generator().manual_seed(seed)
        drawn[name] = torch.stack([_draw(text, *size, generator) for text in texts])
    return drawn, [f'a sign that says "{text}"' for text in texts]


def _draw(text: str, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw a text, (3, height, width) in [0, 1], between rounded levels as decoded images are."""
    scale = 0.4 + 0.3 * torch.rand((), generator=generator).item()
    back, front, tint = torch.rand(3, 3, 1, 1, generator=generator)
    image = Image.new("L", (width, height))
    font = ImageFont.load_default(round(scale * height))
    ImageDraw.Draw(image).text((width / 2, height / 2), text, fill=255, font=font, anchor="mm")
    ink = to_tensor(image)
    return ((1 - ink) * (0.6 + 0.4 * back) + ink * 0.5 * front + 0.002 * tint).clamp(0, 1)


def measure(
    kind: type[LearnedReward], path: str, pictures: dict[str, Tensor], prompts: list[str]
) -> list[dict[str, Any]]:
    """Return a row for each set of images (N, 3, H, W) and mode of a reward."""
    official = kind.from_pretrained(path, options=OFFICIAL)
    usable = [row for row, prompt in enumerate(prompts) if _can_score(official, prompt)]
    own = [prompts[row] for row in usable]
    rows = []
    for name, images in pictures.items():
        with torch.no_grad():
            expected = official(images[usable], own)
            for mode, target in TARGETS.items():
                reward = kind.from_pretrained(path, options=RewardOptions(mode))
                difference = reward(images[usable], own) - expected
                std = expected.std().item()
                error = difference.square().mean().sqrt().item() / std
                row = {"reward": kind.name, "pictures": name, "count": len(own), "std": std, "mode": mode}
                largest = difference.abs().max().item() / std
                rows.append(row | {"error": error, "largest": largest, "target": target})
    return rows


def _can_score(reward: LearnedReward, prompt: str) -> bool:
    try:
        reward.check_can_score([prompt])
    except ValueError:
        return False
    return True


def table(document: dict[str, Any]) -> str:
    """Return the Markdown of a results document."""
    lines = [
        f"`{document['command']}`: seed {document['seed']}, torch {document['torch']}, on the CPU.",
        "",
        "| reward | images | n | std of the score | mode | error / std | largest / std | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        mark = "" if row["error"] <= row["target"] else " **fails**"
        lines.append(
            f"| {row['reward']} | {row['pictures']} | {row['count']} | {row['std']:.3g} | {row['mode']} |"
            f" {row['error']:.2%}{mark} | {row['largest']:.2%} | {row['target']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=path_flag, help="JSON file; its table goes into rewards.md beside it"
    )
    args = parser.parse_args()
    images, prompts = decoded(args.seed)
    sizes = enlarged(images)
    rows = []
    for kind, path in (embedded() | {ImageNetClass: ImageNetClass.released}).items():
        rows += measure(kind, path, sizes, prompts)
    rows += measure(OCR, OCR.released, *words(prompts, args.seed))
    command = "python scripts/docs/preprocessing_error.py --output docs/preprocessing_error.json"
    document = {"command": command, "seed": args.seed, "torch": torch.__version__, "rows": rows}
    print(table(document))
    if args.output:
        write_results(document, args.output, table(document))


if __name__ == "__main__":
    main()
