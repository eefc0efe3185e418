"""Colourfulness of Hasler and Suesstrunk (2003): a differentiable reward without weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from am_diffusers.rewards.base import check_images, check_prompts

EPSILON = 1e-12


class Colourfulness:
    """Spread and strength of the opponent colours rg = R - G and yb = (R + G) / 2 - B.

    sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2), in [0, 1.6]: 0 for a grey picture. The published
    metric is 255 times this, for 8-bit values.
    """

    name = "colourfulness"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Colourfulness (B,); the prompts don't matter."""
        check_images(images)
        check_prompts(prompts, len(images))
        red, green, blue = images.flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
        variance, mean = torch.var_mean(opponents, dim=2, correction=0)
        # EPSILON: the square root of a grey picture's 0 has no gradient.
        return (variance.sum(1) + EPSILON).sqrt() + 0.3 * (mean.square().sum(1) + EPSILON).sqrt()
