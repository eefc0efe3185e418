"""Scores of base images that a run needs before its first iteration: made once, kept in its folder."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from am_diffusers.config import Config
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.images import Sampler
from am_diffusers.evaluation.panel import CERTIFICATE_FILE
from am_diffusers.evaluation.scores import is_about, load_scores, save_scores, score_images
from am_diffusers.rewards import Reward, RewardScale
from am_diffusers.system.processes import Processes
from am_diffusers.training.checkpoint_folder import Checkpoints
from am_diffusers.velocity import VelocityField

DIVERGENCE, FRONTIER, CERTIFICATE = "base_rewards.json", "frontier.json", CERTIFICATE_FILE


def base_scores(
    config: Config,
    name: str,
    sampler: Sampler,
    base: VelocityField,
    rewards: Sequence[Reward],
    *,
    prompts: Sequence[str],
    images_per_prompt: int,
    processes: Processes,
) -> dict[str, Tensor]:
    """Return scores (P prompts, S images) of base images by reward name, stored ones where there are any.

    Args:
        config: flags of the run.
        name: name of the file in the output folder; a fresh start replaces that of an earlier run.
        sampler: makes the images.
        base: field before fine-tuning, with its guidance.
        rewards: scores to take.
        prompts: P prompts.
        images_per_prompt: S.
        processes: share the work.

    Raises:
        ValueError: if the file is damaged or about other prompts.
    """
    file = Path(config.run.output_dir) / name

    def stored() -> dict[str, Tensor] | None:
        # Without a checkpoint the file is of an earlier run. Validation prompts are free to change; what a
        # target was chosen by isn't.
        fresh = not Checkpoints(file.parent).list()
        if fresh or not file.exists() or (name == CERTIFICATE and not is_about(file, prompts)):
            return None
        return load_scores(file, prompts)

    scores = processes.from_main(stored)
    wanted = {reward.name: (len(prompts), images_per_prompt) for reward in rewards}
    if scores is not None and {key: tuple(each.shape) for key, each in scores.items()} == wanted:
        return scores
    with processes.together():
        scores = score_images(sampler, base, rewards, prompts, images_per_prompt, processes=processes)
    processes.on_main(lambda: save_scores(file, prompts, scores))
    return scores


def trained_scales(config: Config) -> dict[str, RewardScale]:
    """Return the scales of the trained rewards in their sum, by name."""
    return {each.name: RewardScale(each.weight, each.mean, each.std) for each in config.method.rewards}


def stored_frontier(config: Config) -> Frontier | None:
    """Return the frontier of `--frontier`, else the one that the run left in its folder, else None.

    Raises:
        ValueError: if the file is missing or damaged, or lacks the score of a trained reward.
    """
    given = config.evaluation.frontier
    file = Path(config.run.output_dir) / FRONTIER if given is None else Path(given)
    if not file.is_file():
        if given is None:
            return None
        raise ValueError(f"--frontier {file}: no such file; scripts/calibrate_rewards.py writes one")
    scores, trained = load_scores(file), trained_scales(config)
    missing = sorted(set(trained) - set(scores))
    if missing and given is None:  # of an earlier run with other rewards, which a fresh start replaces
        return None
    if missing:
        raise ValueError(f"{file} has no scores of {', '.join(missing)}: calibrate with this config")
    return Frontier.of(scores, trained)
