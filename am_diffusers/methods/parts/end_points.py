"""Clean images to train on, whatever sampler made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers.methods.base import Method
from am_diffusers.rollout import sample
from am_diffusers.system.failures import phase
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True)
class EndPointSettings:
    """Methods that train on clean images, whatever sampler made them.

    Attributes:
        rollout_sampler: how images are made in training, in num_inference_steps steps: by
            the model's own ODE, or a stochastic table (see `am_diffusers.transitions`).
    """

    rollout_sampler: Literal["ode_euler", "memoryless_local_linear", "memoryless_euler", "ancestral"] = (
        "ode_euler"
    )


def draw_images(
    method: Method[Any], field: VelocityField, cond: Conditioning, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return clean latents (B, ...) of `field` by the method's sampler, `Sizes.rollout` at a time."""
    table = method.around.table(method.own.rollout_sampler, method.shared.num_inference_steps)
    images = []
    for rows in torch.arange(len(cond)).split(method.sizes.rollout or len(cond)):
        ids = rows.tolist()
        some = [generators[i] for i in ids]
        noise = method.latents.draw(some)
        with phase("rollout", len(some)):
            images.append(
                sample(field, table, cond.index(ids), noise, lambda _, some=some: method.latents.draw(some))
            )
    return torch.cat(images)
