"""Mirror symmetry: a differentiable reward without weights that no single pixel decides."""

from collections.abc import Sequence

from torch import Tensor

from am_diffusers.rewards.base import check_images, check_prompts


class Symmetry:
    """Minus the mean squared difference from the left-right mirrored picture, in [-1, 0].

    Every symmetric picture is an optimum: a reward under which pictures should stay diverse.
    """

    name = "symmetry"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Symmetry (B,); the prompts don't matter."""
        check_images(images)
        check_prompts(prompts, len(images))
        return -(images - images.flip(-1)).square().flatten(1).mean(1)
