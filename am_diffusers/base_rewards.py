"""Rewards of base pictures: what rewards are calibrated with, and divergences normalised."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import trange

from am_diffusers.redact import redact_values
from am_diffusers.rewards import Reward
from am_diffusers.samples import Sampler, pictures_of
from am_diffusers.velocity import VelocityField


@torch.no_grad()
def base_rewards(
    sampler: Sampler,
    base: VelocityField,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images_per_prompt: int,
    *,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Scores (P prompts, S images) of base pictures by reward name, float64, the same on all processes.

    Args:
        sampler: makes the pictures, `sampler.batch_size` at a time.
        base: field before fine-tuning.
        rewards: scores to take, each under a name of its own.
        prompts: P prompts.
        images_per_prompt: S.
        accelerator: processes that share the work.
    """
    which = pictures_of(len(prompts), images_per_prompt)
    mine = which[accelerator.process_index :: accelerator.num_processes]
    scored: list[tuple[int, int, list[float]]] = []
    for start in trange(0, len(mine), sampler.batch_size, desc="base pictures", disable=None):
        batch = mine[start : start + sampler.batch_size]
        images, texts = sampler.pictures(base, prompts, batch), [prompts[p.prompt] for p in batch]
        scores = zip(*(reward(images, texts).tolist() for reward in rewards), strict=True)
        scored.extend((p.prompt, p.image, list(each)) for p, each in zip(batch, scores, strict=True))
    ordered = sorted(gather_object(scored))
    table = torch.tensor([scores for _, _, scores in ordered], dtype=torch.float64)
    shaped = table.view(len(prompts), images_per_prompt, len(rewards))
    return {reward.name: shaped[:, :, column] for column, reward in enumerate(rewards)}


def save_base_rewards(file: Path, prompts: Sequence[str], scores: Mapping[str, Tensor]) -> None:
    """Write prompts and scores as JSON."""
    document = {"prompts": redact_values(prompts), "scores": {name: s.tolist() for name, s in scores.items()}}
    file.write_text(json.dumps(document, allow_nan=False) + "\n", "utf-8")
