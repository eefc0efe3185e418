"""Methods around fields in closed form: how the tests make them, collect rows and take their loss."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.noise import LatentSpec, generator_for, generators_for
from am_diffusers.transitions import shifted_sigmas, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning, VelocityField
from oracles import THREE_MODES

BASE = THREE_MODES.field()
OFFSET = CallableField(lambda x, sigma, cond: THREE_MODES.velocity(x, sigma) + 0.3 * torch.tanh(x))
LATENTS = LatentSpec((2,), dtype=torch.float64)
SHARED = {field.name for field in fields(SharedSettings)}


def concave(x: Tensor, prompts: Any) -> Tensor:
    return x[:, 0] - 0.3 * x.square().sum(1)


def around(
    policy: VelocityField,
    base: VelocityField,
    *,
    reward: Callable[..., Tensor] = concave,
    latents: LatentSpec = LATENTS,
    sigmas: Callable[[int], Tensor] = uniform_sigmas,
    **more: Any,
) -> Surroundings:
    """Return what a method is given; `more` are further fields of `Surroundings`."""
    return Surroundings(policy, base, reward, latents, lambda steps, noisy: sigmas(steps), **more)


def make_method(name: str, policy: VelocityField = OFFSET, base: VelocityField = BASE, **given: Any) -> Any:
    """Return a method of 8 steps and reward scale 2.

    Args:
        name: key of `METHODS`.
        policy: field that is trained.
        base: field before fine-tuning.
        given: flags, shared and the method's own, and what `around` takes.
    """
    method = METHODS[name]
    own = {field.name for field in fields(method.Settings)}
    shared = {"num_inference_steps": 8, "reward_scale": 2.0} | _part(given, SHARED)
    settings = method.Settings(**_part(given, own))
    return method(
        around(policy, base, **_part(given, set(given) - SHARED - own)), SharedSettings(**shared), settings
    )


def _part(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


adjoint_matching = partial(make_method, "adjoint_matching")
deterministic = partial(
    make_method,
    "deterministic_adjoint_matching",
    sigmas=lambda steps: shifted_sigmas(steps, 3.0),
    truncate_steps=3,
    mask_quantile=None,
)
efficient = partial(make_method, "efficient_adjoint_matching", eam_ode_steps=6)


def collect(method: Any, num: int = 6, iteration: int = 0, first: int = 0, group: int = 1) -> Any:
    """Collect samples first .. first + num - 1 of an iteration, `group` neighbours sharing a prompt."""
    ids = range(first, first + num)
    cond = Conditioning(tuple(f"prompt {i // group}" for i in ids))
    return method.collect(cond, generators_for(0, iteration, ids), generator_for(0, iteration, "shared"))


def total_loss(method: Any, collected: Any, size: int = 100) -> float:
    return sum(method.loss(part)[0].item() for part in collected.examples.split(size))
