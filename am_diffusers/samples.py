"""Pictures of base and tuned model from the same noise, by deterministic sampling.

Every picture has a generator of its own, a function of (seed, prompt index, image index): neither the batch
size nor the number of processes changes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.rollout import LatentSpec, generator_for, sample
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


class Picture(NamedTuple):
    """Which picture: the index of its prompt and its index among the pictures of that prompt."""

    prompt: int
    image: int


def pictures_of(num_prompts: int, images_per_prompt: int) -> list[Picture]:
    """All pictures of so many prompts, prompt by prompt."""
    return [Picture(p, i) for p in range(num_prompts) for i in range(images_per_prompt)]


def share_of(which: Sequence[Picture], index: int, number: int) -> list[Picture]:
    """What process `index` of `number` makes of the pictures: as many as every other one.

    Where they can't be divided evenly some are made twice: with weights spread over the processes, all must
    make the same calls.
    """
    size = -(-len(which) // number)
    return [which[(index + number * i) % len(which)] for i in range(size)]


@dataclass(frozen=True)
class Sampler:
    """Prompts and noise to pictures.

    Attributes:
        transitions: table of the sampler, deterministic.
        encode: B prompts to their conditioning.
        decode: latents (B, C, h, w) to pictures (B, 3, H, W) in [0, 1].
        latents: shape and device of the latents.
        seed: seed of the run.
        batch_size: pictures at a time.
        purpose: names the stream of noise; validation and evaluation share one.
    """

    transitions: Transitions
    encode: Callable[[Sequence[str]], Conditioning]
    decode: Callable[[Tensor], Tensor]
    latents: LatentSpec
    seed: int
    batch_size: int
    purpose: str = "picture"

    @torch.no_grad()
    def pictures(self, field: VelocityField, prompts: Sequence[str], which: Sequence[Picture]) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] on the CPU.

        Args:
            field: base or policy, guided or not.
            prompts: what `Picture.prompt` counts.
            which: the N >= 1 pictures to make.
        """
        made = []
        for start in range(0, len(which), self.batch_size):
            batch = which[start : start + self.batch_size]
            cond = self.encode([prompts[picture.prompt] for picture in batch])
            noise = self.latents.draw([self.generator(picture) for picture in batch])
            made.append(self.decode(sample(field, self.transitions, cond, noise)).cpu())
        return torch.cat(made)

    def generator(self, picture: Picture) -> torch.Generator:
        """Where a picture's starting noise comes from.

        A float32 Diffusers pipeline starts from the same noise when it is called with
        `generator=torch.Generator().manual_seed(sampler.generator(picture).initial_seed())`.
        """
        return generator_for(self.seed, self.purpose, picture.prompt, picture.image)
