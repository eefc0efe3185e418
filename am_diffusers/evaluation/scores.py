"""Scores of images of a model, image by image: what rewards are calibrated with and tilts are told from."""

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

PATH_KL = "path KL"
"""Name of the column of path KL among scores; no reward has a name with a space."""


@torch.no_grad()
def score_images(
    sampler: Sampler,
    field: VelocityField,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images_per_prompt: int,
    *,
    processes: Processes,
    base: VelocityField | None = None,
) -> dict[str, Tensor]:
    """Return scores (P prompts, S images) by reward name, float64, the same on all processes.

    All processes call it, inside `processes.together()`.

    Args:
        sampler: makes the images, `sampler.batch_size` at a time.
        field: model whose images are scored.
        rewards: scores to take, each under a name of its own.
        prompts: P prompts.
        images_per_prompt: S.
        processes: share the work.
        base: also return the path KL from this field, in nats, as `PATH_KL`; the sampler is a stochastic
            table.

    Raises:
        PeerError: another process failed.
    """
    which = image_ids(len(prompts), images_per_prompt)
    mine = share_of(which, processes.index, processes.number)
    names = [reward.name for reward in rewards] + ([] if base is None else [PATH_KL])
    scored: list[tuple[int, int, list[float]]] = []
    what = "base images" if base is None else "certificate"
    for start in trange(0, len(mine), sampler.batch_size, desc=what, leave=base is None, disable=None):
        batch = mine[start : start + sampler.batch_size]
        made = sampler.sample(field, prompts, batch, base=base)
        texts = [prompts[p.prompt] for p in batch]
        columns = [reward(made.images, texts).tolist() for reward in rewards]
        if base is not None and made.path_kl is not None:
            columns.append(made.path_kl.tolist())
        rows = zip(batch, zip(*columns, strict=True), strict=True)
        scored.extend((p.prompt, p.image, list(each)) for p, each in rows)
    found = {(prompt, image): scores for prompt, image, scores in processes.gather_objects(scored)}
    table = torch.tensor([found[image_id] for image_id in which], dtype=torch.float64)
    shaped = table.view(len(prompts), images_per_prompt, len(names))
    return {name: shaped[:, :, column] for column, name in enumerate(names)}


def save_scores(file: Path, prompts: Sequence[str], scores: Mapping[str, Tensor]) -> None:
    """Write prompts and scores as JSON, whole or not at all."""
    tables = {name: each.tolist() for name, each in scores.items()}
    write_json(file, {"prompts": redact_values(prompts), "scores": tables})


def load_scores(file: Path, prompts: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Load what `save_scores` wrote, (P, S) each; for these prompts, if they are given.

    Raises:
        ValueError: if the file can't be read or is about other prompts.
    """
    try:
        document = json.loads(file.read_text("utf-8"))
        scores = {name: torch.tensor(s, dtype=torch.float64) for name, s in document["scores"].items()}
        written = document["prompts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it to score base images again") from error
    if prompts is not None and written != redact_values(prompts):
        raise ValueError(f"{file} is about other prompts: remove it to score base images again")
    return scores
