"""Scores of pairs of pictures, base and tuned from the same noise, for `evaluation.summarise`."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import trange

from am_diffusers.evaluation import Array, PairScore
from am_diffusers.rewards import ImageFeatures, LearnedReward, Reward
from am_diffusers.samples import Picture, Sampler
from am_diffusers.velocity import VelocityField


def official(reward: Reward) -> Reward:
    """The same reward with the published preprocessing; it shares the weights."""
    if not isinstance(reward, LearnedReward):
        return reward
    published = copy(reward)
    published.options = replace(reward.options, mode="official")
    return published


@dataclass(frozen=True)
class Scorer:
    """Makes and scores pairs.

    Attributes:
        sampler: makes the pictures, `sampler.batch_size` at a time.
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
    def pairs(self, prompts: Sequence[str], which: Sequence[Picture]) -> list[PairScore]:
        """Scores of the pictures `which` of `prompts`, in that order."""
        scored: list[PairScore] = []
        for start in trange(0, len(which), self.sampler.batch_size, desc="evaluation", disable=None):
            scored.extend(self._batch(prompts, which[start : start + self.sampler.batch_size]))
        return scored

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str]
    ) -> tuple[list[dict[str, float]], list[Array | None]]:
        """Scores by reward name and image features (D,) of each picture.

        Args:
            images: pictures (N, 3, H, W) in [0, 1].
            prompts: their N prompts.
        """
        columns = {reward.name: reward(images, prompts).tolist() for reward in self.rewards}
        scores = [{name: column[row] for name, column in columns.items()} for row in range(len(images))]
        if self.features is None:
            return scores, [None] * len(images)
        return scores, list(self.features.image_features(images).double().cpu().numpy())

    def _batch(self, prompts: Sequence[str], which: Sequence[Picture]) -> list[PairScore]:
        images = torch.stack([self.sampler.pictures(f, prompts, which) for f in (self.base, self.tuned)], 1)
        texts = [prompts[picture.prompt] for picture in which for _ in range(2)]
        scores, features = self.score(images.flatten(0, 1), texts)
        return [
            PairScore.of(picture, scores[2 * row : 2 * row + 2], features[2 * row : 2 * row + 2])
            for row, picture in enumerate(which)
        ]
