"""Stages `samples` and `rewards`: what the base draws, judged, and how well rewards order held-out pairs."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from am_diffusers.rewards import HPSv2, ImageReward, PickScore
from am_diffusers.rewards.imagenet_class import ImageNetClass, load_classifier, official_pixels
from am_diffusers.rewards.world import Heads, judge_features

from .judge import NAMES
from .loop import Loop
from .preferences import current_models, decode, generate, pair_accuracy
from .transformer import CaptionCache
from .world import CLEAN, CONDITIONS, Labels, World

EULER_STEPS = 28


def draw_base(world: World, loop: Loop) -> tuple[Tensor, Labels]:
    """Draw `loop.steps` batches of images without guidance from the transformer as it is now."""
    transformer, vae = current_models(loop)
    captions, images, rows = CaptionCache(world, loop), [], []
    for part in range(loop.steps):
        generator = torch.Generator().manual_seed(30_000_000 + part)
        labels = world.draw(loop.batch, generator)
        texts = world.captions(labels)
        latents = generate(transformer, captions, texts, steps=EULER_STEPS, generator=generator)
        images.append(decode(vae, latents).cpu())
        rows.append(torch.stack([labels.concept, labels.background]))
    concept, background = torch.cat(rows, 1)
    return torch.cat(images), Labels(concept, background, torch.zeros_like(concept))


@torch.no_grad()
def judged(heads: Heads, images: Tensor, asked: Labels) -> dict[str, float]:
    """Give the share of clean images, of each defect, and of right ones among the clean."""
    classifier = load_classifier(ImageNetClass.released).eval()
    parts = [judge_features(classifier, official_pixels(part)) for part in images.split(64)]
    found = Labels(*(heads.logits(torch.cat(parts), head).argmax(1) for head in NAMES))
    clean = found.condition == CLEAN
    concept, background = found.concept == asked.concept, found.background == asked.background
    figures = {
        "images": len(asked),
        "clean share": clean.float().mean().item(),
        "right share of clean": (concept & background)[clean].float().mean().item(),
        "right concept of clean": concept[clean].float().mean().item(),
        "right background of clean": background[clean].float().mean().item(),
        "right concept of all": concept.float().mean().item(),
    }
    shares = torch.bincount(found.condition, minlength=len(CONDITIONS)) / len(asked)
    return figures | {f"share {name}": shares[number].item() for number, name in enumerate(CONDITIONS)}


def save_samples(world: World, loop: Loop) -> dict[str, float]:
    """Draw from the base, save a sheet of 64, and append what the judge says to `samples.jsonl`."""
    state = torch.load(loop.folder / "transformer.pt", weights_only=True, mmap=True)
    images, asked = draw_base(world, loop)
    sheets = loop.folder / "sheets"
    sheets.mkdir(exist_ok=True)
    save_image(images[:64], sheets / f"base-{state['step']:06d}.png", nrow=8, padding=2, pad_value=1)
    figures = {"step": state["step"]}
    file = loop.folder / "judge.safetensors"
    if file.exists():
        figures |= judged(Heads.load(file), images, asked)
    with (loop.folder / "samples.jsonl").open("a") as log:
        print(json.dumps(figures), file=log)
    return figures


def measure_rewards(world: World, loop: Loop) -> dict[str, dict[str, float]]:
    """Write the accuracies of the rewards that are there to `rewards.json`."""
    kinds = {"pickscore": PickScore, "hpsv2": HPSv2, "image_reward": ImageReward}
    figures = {}
    for name, kind in kinds.items():
        folder: Path = loop.folder / f"tiny_{name}"
        if folder.exists():
            figures[name] = pair_accuracy(kind.from_pretrained(folder), world, loop.folder)
    (loop.folder / "rewards.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures
