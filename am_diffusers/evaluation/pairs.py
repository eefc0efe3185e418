"""Scores of pairs of images, base and tuned from the same noise, for `evaluation.summarise`."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from am_diffusers.evaluation.images import ImageId, Sampler
from am_diffusers.evaluation.statistics import Array
from am_diffusers.rewards import ImageFeatures, LearnedReward, Reward
from am_diffusers.velocity import VelocityField


@dataclass(frozen=True)
class PairScore:
    """Scores of one base image and the tuned image from the same noise.

    Attributes:
        prompt: index of the evaluation prompt.
        image: index of the image among those of its prompt.
        scores: by reward name, (base, tuned).
        features: image features (2, D) of base and tuned, or None.
    """

    prompt: int
    image: int
    scores: dict[str, tuple[float, float]]
    features: Array | None

    @classmethod
    def of(
        cls,
        image_id: tuple[int, int],
        scores: Sequence[dict[str, float]],
        features: Sequence[Array | None],
    ) -> "PairScore":
        """Make a pair from (base, tuned) scores and features of the image (prompt, image)."""
        base, tuned = scores
        known = [feature for feature in features if feature is not None]
        paired = {name: (base[name], tuned[name]) for name in base}
        return cls(*image_id, paired, np.stack(known) if known else None)


def by_prompt(pairs: Sequence[PairScore]) -> tuple[dict[str, Array], Array | None]:
    """Scores and features of all pairs, whatever order and processes they come from.

    Args:
        pairs: one for every (prompt, image).

    Returns:
        Scores by reward name, (P prompts, S images a prompt, 2: base and tuned), and features
        (P, S, 2, D) if there are any.
    """
    ordered = sorted(pairs, key=lambda pair: (pair.prompt, pair.image))
    num_images = 1 + max(pair.image for pair in ordered)
    shape = (len(ordered) // num_images, num_images, 2)
    scores = {
        name: np.array([pair.scores[name] for pair in ordered]).reshape(shape) for name in ordered[0].scores
    }
    known = [pair.features for pair in ordered if pair.features is not None]
    return scores, np.stack(known).reshape(*shape, -1) if known else None


def official(reward: Reward) -> Reward:
    """Return the same reward with the published preprocessing; it shares the weights."""
    if not isinstance(reward, LearnedReward):
        return reward
    published = copy(reward)
    published.options = replace(reward.options, mode="official")
    return published


@dataclass(frozen=True)
class Scorer:
    """Makes and scores pairs.

    Attributes:
        sampler: makes the images, `sampler.batch_size` at a time.
        base: field before fine-tuning.
        tuned: field after fine-tuning, with the same guidance as `base`.
        rewards: scores to take, each under a name of its own.
        features: reward whose image features are kept, for diversity; None = none.
    """

    sampler: Sampler
    base: VelocityField
    tuned: VelocityField
    rewards: Sequence[Reward]
    features: ImageFeatures | None

    @torch.no_grad()
    def pairs(self, prompts: Sequence[str], which: Sequence[ImageId]) -> list[PairScore]:
        """Scores of the images `which` of `prompts`, in that order."""
        scored: list[PairScore] = []
        for start in trange(0, len(which), self.sampler.batch_size, desc="evaluation", disable=None):
            scored.extend(self._batch(prompts, which[start : start + self.sampler.batch_size]))
        return scored

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str]
    ) -> tuple[list[dict[str, float]], list[Array | None]]:
        """Scores by reward name and image features (D,) of each image.

        Args:
            images: images (N, 3, H, W) in [0, 1].
            prompts: N prompts of the images.
        """
        columns = {reward.name: reward(images, prompts).tolist() for reward in self.rewards}
        scores = [{name: column[row] for name, column in columns.items()} for row in range(len(images))]
        if self.features is None:
            return scores, [None] * len(images)
        return scores, list(self.features.image_features(images).double().cpu().numpy())

    def _batch(self, prompts: Sequence[str], which: Sequence[ImageId]) -> list[PairScore]:
        images = torch.stack([self.sampler.images(f, prompts, which) for f in (self.base, self.tuned)], 1)
        texts = [prompts[image_id.prompt] for image_id in which for _ in range(2)]
        scores, features = self.score(images.flatten(0, 1), texts)
        return [
            PairScore.of(image_id, scores[2 * row : 2 * row + 2], features[2 * row : 2 * row + 2])
            for row, image_id in enumerate(which)
        ]
