"""The common part of CLIP-type rewards: `scale * cos(image features, text features)`."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from am_diffusers.rewards.base import check_prompts
from am_diffusers.rewards.learned import FeatureReward, RewardOptions, unit_length


class ClipReward(FeatureReward):
    """A reward that compares the image and text features of a frozen two-tower model.

    Text features are computed once per prompt, without gradients.

    Args:
        model: both towers; frozen, set to evaluation and moved in place.
        scale: what the cosine is multiplied with.
        options: how it runs.

    Attributes:
        scale: what the cosine is multiplied with.
    """

    def __init__(self, model: nn.Module, *, scale: float, options: RewardOptions) -> None:
        super().__init__(model, options=options)
        self.scale = scale
        self._text_cache: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens the text tower reads, begin and end marks included."""

    @abstractmethod
    def _num_tokens(self, prompt: str) -> int:
        """Tokens of `prompt` before truncation, begin and end marks included."""

    @abstractmethod
    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text features before normalisation, (B, D); prompts truncated as the official scorer does."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of length 1 of the prompts, without gradients, remembered per prompt."""
        check_prompts(prompts, len(prompts))
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        with torch.no_grad():
            for prompt in new:
                # Alone: with others, the last bits would depend on which are remembered, and a run that was
                # stopped and resumed would not be that of one that wasn't.
                self._text_cache[prompt] = unit_length(self._encode_prompts([prompt]))[0]
        self._count_truncated(new, [self._num_tokens(prompt) for prompt in new], self.context_length)
        return torch.stack([self._text_cache[prompt] for prompt in prompts])

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (self._features(pixels) * self.text_features(prompts)).sum(-1)
