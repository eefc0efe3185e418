"""Images of base and tuned model from the same noise.

Every image has generators of its own, functions of (seed, prompt index, image index): neither the batch
size nor the number of processes changes it. Its starting noise has one, the noise of stochastic steps
another, so that all solvers start from the same noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.noise import LatentSpec, generator_for
from am_diffusers.rollout import Solver
from am_diffusers.velocity import Conditioning, VelocityField

PURPOSE = "picture"
"""Stream of noise of the images that are shown and evaluated."""


class ImageId(NamedTuple):
    """Key of an image: the index of its prompt and its index among the images of that prompt."""

    prompt: int
    image: int


def image_ids(num_prompts: int, images_per_prompt: int) -> list[ImageId]:
    """Return the keys of all images of `num_prompts` prompts, prompt by prompt."""
    return [ImageId(p, i) for p in range(num_prompts) for i in range(images_per_prompt)]


def share_of(which: Sequence[ImageId], index: int, number: int) -> list[ImageId]:
    """Return the images that process `index` of `number` makes: all make the same number.

    Where they can't be divided evenly some are made twice: with weights spread over the processes, all must
    make the same calls.
    """
    size = -(-len(which) // number)
    return [which[(index + number * i) % len(which)] for i in range(size)]


class Sampled(NamedTuple):
    """N images (N, 3, H, W) in [0, 1], and their path KL (N,) in nats where it was taken, on the CPU."""

    images: Tensor
    path_kl: Tensor | None


@dataclass(frozen=True)
class Sampler:
    """Prompts and noise to images.

    Attributes:
        solver: noise to latents, deterministic or stochastic.
        encode: B prompts to their conditioning.
        decode: latents (B, C, h, w) to images (B, 3, H, W) in [0, 1].
        latents: shape and device of the latents.
        seed: seed of the run.
        batch_size: images at a time.
        purpose: names the stream of noise; validation and evaluation share one.
    """

    solver: Solver
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[Tensor], Tensor]
    latents: LatentSpec
    seed: int
    batch_size: int
    purpose: str = PURPOSE

    def images(self, field: VelocityField, prompts: Sequence[str], which: Sequence[ImageId]) -> Tensor:
        """Return images (N, 3, H, W) in [0, 1] on the CPU, see `sample`."""
        return self.sample(field, prompts, which).images

    @torch.no_grad()
    def sample(
        self,
        field: VelocityField,
        prompts: Sequence[str],
        which: Sequence[ImageId],
        *,
        base: VelocityField | None = None,
    ) -> Sampled:
        """Return images, and with `base` their path KL if the solver is a stochastic table.

        Args:
            field: base or policy, guided or not.
            prompts: what `ImageId.prompt` counts.
            which: the N >= 1 images to make.
            base: what the path KL is against, with the same guidance as `field`; None = no path KL.
        """
        made, path_kl = list[Tensor](), list[Tensor]()
        for start in range(0, len(which), self.batch_size):
            batch = which[start : start + self.batch_size]
            cond = self.encode([prompts[image_id.prompt] for image_id in batch])
            noise = self.latents.draw([self.generator(image_id) for image_id in batch])
            steps = [generator_for(self.seed, self.purpose, *image_id, "steps") for image_id in batch]
            solution = self.solver(field, cond, noise, steps, base=base)
            made.append(self.decode(solution.latents).cpu())
            if solution.path_kl is not None:
                path_kl.append(solution.path_kl)
        return Sampled(torch.cat(made), torch.cat(path_kl) if path_kl else None)

    def generator(self, image_id: ImageId) -> torch.Generator:
        """Return the generator of an image's starting noise.

        A float32 Diffusers pipeline starts from the same noise when it is called with
        `generator=torch.Generator().manual_seed(sampler.generator(image_id).initial_seed())`.
        """
        return generator_for(self.seed, self.purpose, image_id.prompt, image_id.image)
