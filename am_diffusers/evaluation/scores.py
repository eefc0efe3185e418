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
        ValueError: an image or score isn't what a reward can take; names the prompts.
    """
    which = image_ids(len(prompts), images_per_prompt)
    mine = share_of(which, processes.index, processes.number)
    names = [reward.name for reward in rewards] + ([] if base is None else [PATH_KL])
    scored: list[tuple[int, int, list[float]]] = []
    what = "base images" if base is None else "images for the certificate"
    for start in trange(0, len(mine), sampler.batch_size, desc=what, leave=base is None, disable=None):
        batch = mine[start : start + sampler.batch_size]
        made = sampler.sample(field, prompts, batch, base=base)
        texts = [prompts[p.prompt] for p in batch]
        try:
            columns = [reward(made.images, texts).tolist() for reward in rewards]
        except ValueError as error:
            raise ValueError(f"{what} of {texts}: {error}") from error
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
    if prompts is not None and not is_about(file, prompts):
        raise ValueError(f"{file} is about other prompts: remove it to score base images again")
    return _read(file)[1]


def is_about(file: Path, prompts: Sequence[str]) -> bool:
    """Return whether the scores in a file are those of these prompts; raises as `load_scores`."""
    return _read(file)[0] == redact_values(prompts)


def _read(file: Path) -> tuple[object, dict[str, Tensor]]:
    try:
        document = json.loads(file.read_text("utf-8"))
        scores = {name: torch.tensor(s, dtype=torch.float64) for name, s in document["scores"].items()}
        return document["prompts"], scores
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it to score base images again") from error
