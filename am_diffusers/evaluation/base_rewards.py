"""Rewards of base images: what rewards are calibrated with, and divergences normalised."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from am_diffusers.evaluation.images import Sampler, image_ids, share_of
from am_diffusers.rewards import Reward
from am_diffusers.system.files import write_json
from am_diffusers.system.processes import Processes
from am_diffusers.system.text import redact_values
from am_diffusers.velocity import VelocityField

BASE_REWARDS_FILE = "base_rewards.json"


@torch.no_grad()
def base_rewards(
    sampler: Sampler,
    base: VelocityField,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images_per_prompt: int,
    *,
    processes: Processes,
) -> dict[str, Tensor]:
    """Return scores (P prompts, S images) of base images by reward name, float64, the same on all processes.

    All processes call it, inside `processes.together()`.

    Args:
        sampler: makes the images, `sampler.batch_size` at a time.
        base: field before fine-tuning.
        rewards: scores to take, each under a name of its own.
        prompts: P prompts.
        images_per_prompt: S.
        processes: share the work.

    Raises:
        PeerError: another process failed.
    """
    which = image_ids(len(prompts), images_per_prompt)
    mine = share_of(which, processes.index, processes.number)
    scored: list[tuple[int, int, list[float]]] = []
    for start in trange(0, len(mine), sampler.batch_size, desc="base images", disable=None):
        batch = mine[start : start + sampler.batch_size]
        images, texts = sampler.images(base, prompts, batch), [prompts[p.prompt] for p in batch]
        scores = zip(*(reward(images, texts).tolist() for reward in rewards), strict=True)
        scored.extend((p.prompt, p.image, list(each)) for p, each in zip(batch, scores, strict=True))
    found = {(prompt, image): scores for prompt, image, scores in processes.gather_objects(scored)}
    table = torch.tensor([found[image_id] for image_id in which], dtype=torch.float64)
    shaped = table.view(len(prompts), images_per_prompt, len(rewards))
    return {reward.name: shaped[:, :, column] for column, reward in enumerate(rewards)}


def save_base_rewards(file: Path, prompts: Sequence[str], scores: Mapping[str, Tensor]) -> None:
    """Write prompts and scores as JSON, whole or not at all."""
    tables = {name: each.tolist() for name, each in scores.items()}
    write_json(file, {"prompts": redact_values(prompts), "scores": tables})


def load_base_rewards(file: Path, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Load what `save_base_rewards` wrote for these prompts, (P, S) each.

    Raises:
        ValueError: if the file can't be read or is about other prompts.
    """
    try:
        document = json.loads(file.read_text("utf-8"))
        scores = {name: torch.tensor(s, dtype=torch.float64) for name, s in document["scores"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it to score base images again") from error
    if document["prompts"] != redact_values(prompts):
        raise ValueError(f"{file} is about other prompts: remove it to score base images again")
    return scores
