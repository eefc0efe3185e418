"""A method made of a row of the comparison, by its real class, around a field in closed form."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from am_diffusers.methods import Method
from am_diffusers.methods.adjoint_matching import AdjointMatching, AdjointMatchingSettings
from am_diffusers.methods.buffered_adjoint_matching import BufferedAdjointMatching, BufferSettings
from am_diffusers.methods.deterministic_adjoint_matching import (
    DeterministicAdjointMatching,
    DeterministicSettings,
)
from am_diffusers.methods.draft import DRaFT
from am_diffusers.methods.efficient_adjoint_matching import EfficientAdjointMatching, EfficientSettings
from am_diffusers.methods.flow_grpo import FlowGRPO, FlowGRPOSettings
from am_diffusers.methods.parts.advantages import Advantages
from am_diffusers.methods.parts.tails import TailSettings
from am_diffusers.methods.ram import RAM, RAMSettings
from am_diffusers.methods.refl import ReFL, last_quarter
from am_diffusers.noise import LatentSpec
from am_diffusers.transitions import uniform_sigmas
from am_diffusers.velocity import CallableField
from benching.oracles.laws import conditioning
from benching.oracles.problems import REWARD_SCALE, Problem
from benching.oracles.variants import Variant


@dataclass(frozen=True)
class Surroundings:
    """What a method is made around: the trained field, the base's, and the problem."""

    policy: CallableField
    problem: Problem

    @property
    def base(self) -> CallableField:
        """The base's velocity in closed form."""
        return self.problem.law.field()

    @property
    def latents(self) -> LatentSpec:
        """Shape and precision of a state."""
        return LatentSpec((self.problem.dim,), dtype=torch.float64)


def make_method(variant: Variant, around: Surroundings) -> Method:
    """The method of a row, of its real class."""
    return _MAKERS[variant.method](variant, around)


def resolved_settings(method: Method) -> dict[str, Any]:
    """All settings of a made method, defaults too, for JSON: what a result depends on."""
    parts = {"": method, "inner": getattr(method, "inner", None)}
    found = {name: getattr(part, "settings", None) for name, part in parts.items()}
    return {name: dataclasses.asdict(settings) for name, settings in found.items() if settings is not None}


def _adjoint_matching(variant: Variant, around: Surroundings) -> AdjointMatching:
    return AdjointMatching(
        around.policy,
        around.base,
        around.problem.reward,
        variant.transitions(),
        latents=around.latents,
        settings=AdjointMatchingSettings(REWARD_SCALE, **variant.settings),
    )


def _buffered(variant: Variant, around: Surroundings) -> BufferedAdjointMatching:
    return BufferedAdjointMatching(
        _adjoint_matching(variant, around), lambda prompts: conditioning(len(prompts)), BufferSettings()
    )


def _efficient(variant: Variant, around: Surroundings) -> EfficientAdjointMatching:
    return EfficientAdjointMatching(
        around.policy,
        around.base,
        around.problem.reward,
        uniform_sigmas(variant.num_steps),
        latents=around.latents,
        settings=EfficientSettings(REWARD_SCALE, **variant.settings),
    )


def _deterministic(variant: Variant, around: Surroundings) -> DeterministicAdjointMatching:
    return DeterministicAdjointMatching(
        around.policy,
        around.base,
        around.problem.reward,
        variant.transitions(),
        latents=around.latents,
        settings=DeterministicSettings(REWARD_SCALE, **variant.settings),
    )


def _ram(variant: Variant, around: Surroundings) -> RAM:
    advantages = Advantages(REWARD_SCALE, variant.parts["group"])
    return RAM(
        around.policy,
        around.base,
        around.problem.reward,
        variant.transitions(),
        latents=around.latents,
        settings=RAMSettings(advantages, **variant.settings),
    )


def _flow_grpo(variant: Variant, around: Surroundings) -> FlowGRPO:
    advantages = Advantages(REWARD_SCALE, variant.parts["group"])
    return FlowGRPO(
        around.policy,
        around.base,
        around.problem.reward,
        variant.transitions(),
        latents=around.latents,
        settings=FlowGRPOSettings(advantages, **variant.settings),
    )


def _draft(variant: Variant, around: Surroundings) -> DRaFT:
    return DRaFT(
        around.policy,
        around.problem.reward,
        variant.transitions(),
        steps=variant.parts["steps"],
        latents=around.latents,
        settings=TailSettings(REWARD_SCALE),
    )


def _refl(variant: Variant, around: Surroundings) -> ReFL:
    return ReFL(
        around.policy,
        around.problem.reward,
        variant.transitions(),
        last_steps=last_quarter(variant.num_steps),
        latents=around.latents,
        settings=TailSettings(REWARD_SCALE),
    )


_MAKERS: dict[str, Callable[[Variant, Surroundings], Method]] = {
    "adjoint_matching": _adjoint_matching,
    "buffered_adjoint_matching": _buffered,
    "efficient_adjoint_matching": _efficient,
    "deterministic_adjoint_matching": _deterministic,
    "ram": _ram,
    "flow_grpo": _flow_grpo,
    "draft": _draft,
    "refl": _refl,
}
