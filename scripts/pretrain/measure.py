"""Stage `measure`: how well the shipped pipeline follows prompts and the rewards order held-out pairs.

Prompt following is judged by a reward's towers: is the picture's own caption, among the 64 held-out ones,
the nearest? Backgrounds are judged by the pixels of the picture's corners.
"""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from am_diffusers.rewards import HPSv2, ImageReward, PickScore

from .data import PictureSet, background_of
from .export import evaluation_combinations
from .preferences import pair_accuracy

IMAGES_PER_PROMPT, STEPS = 4, 28


def pipeline_pictures(pipeline: StableDiffusion3Pipeline, prompts: list[str], guidance: float) -> Tensor:
    """IMAGES_PER_PROMPT pictures a prompt, (P * IMAGES_PER_PROMPT, 3, 64, 64) in [0, 1]."""
    pictures = []
    for row, prompt in enumerate(prompts):
        pictures.append(
            pipeline(
                prompt,
                height=64,
                width=64,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                max_sequence_length=8,
                num_images_per_prompt=IMAGES_PER_PROMPT,
                generator=torch.Generator().manual_seed(row),
                output_type="pt",
            ).images
        )
    return torch.cat(pictures)


def measure(data: PictureSet, work: Path, assets: Path) -> dict[str, object]:
    """All figures of the model cards, written to `assets / measured.json`."""
    rewards = {"pickscore": PickScore.from_pretrained(assets / "tiny_pickscore")}
    rewards["hpsv2"] = HPSv2.from_pretrained(assets / "tiny_hpsv2")
    pipeline = StableDiffusion3Pipeline.from_pretrained(assets / "tiny_sd3")
    pipeline.set_progress_bar_config(disable=True)
    labels = data.labels(evaluation_combinations(data))
    captions = data.captions(labels)
    repeated = data.labels(evaluation_combinations(data).repeat_interleave(IMAGES_PER_PROMPT))
    sources = {f"guidance {g}": pipeline_pictures(pipeline, captions, g) for g in (1.0, 2.5)}
    sources["real pictures"] = data.pictures(repeated, torch.Generator().manual_seed(0))
    figures: dict[str, object] = {"pictures": len(repeated), "steps": STEPS}
    own = torch.arange(len(captions)).repeat_interleave(IMAGES_PER_PROMPT)
    with torch.no_grad():
        for source, pictures in sources.items():
            row = {"background": (background_of(pictures) == repeated.background).float().mean().item()}
            for name, reward in rewards.items():
                ranked = reward.image_features(pictures) @ reward.text_features(captions).T
                row[f"right caption first, {name}"] = (ranked.argmax(1) == own).float().mean().item()
                row[f"mean {name}"] = reward(pictures, data.captions(repeated)).mean().item()
            figures[source] = row
        judges = rewards | {"image_reward": ImageReward.from_pretrained(assets / "tiny_image_reward")}
        for name, reward in judges.items():
            figures[f"preference accuracy, {name}"] = pair_accuracy(reward, data, work, name)
    (assets / "measured.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures
