"""Mean brightness: a differentiable reward without weights, for tests and first steps."""

from collections.abc import Sequence

from torch import Tensor

from am_diffusers.rewards.base import check_images, check_prompts


class Brightness:
    """Mean of all pixels and channels, in [0, 1]; the optimum is a white picture."""

    name = "brightness"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean pixel value (B,); the prompts don't matter."""
        check_images(images)
        check_prompts(prompts, len(images))
        return images.flatten(1).mean(1)
