"""The methods as they are compared, each with its settings: one table, and how a method is made of a row.

What isn't set here is the default of the method's own settings. `reward_scale` is 1 (oracle_problems.py).
Masks are off where a method has one, as a masked loss has another optimum, but for one row with the default.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from am_diffusers.methods import METHODS, Method
from am_diffusers.methods.adjoint_matching import AdjointMatching, AdjointMatchingSettings
from am_diffusers.methods.buffered_adjoint_matching import BufferedAdjointMatching, BufferSettings
from am_diffusers.methods.deterministic_adjoint_matching import (
    DeterministicAdjointMatching,
    DeterministicSettings,
)
from am_diffusers.methods.draft import DRaFT
from am_diffusers.methods.efficient_adjoint_matching import EfficientAdjointMatching, EfficientSettings
from am_diffusers.methods.flow_grpo import FlowGRPO, FlowGRPOSettings
from am_diffusers.methods.ram import RAM, RAMSettings
from am_diffusers.methods.refl import ReFL, last_quarter
from am_diffusers.methods.tails import TailSettings
from am_diffusers.methods.values import Advantages
from am_diffusers.rollout import LatentSpec
from am_diffusers.transitions import TRANSITIONS, Transitions, uniform_sigmas
from am_diffusers.velocity import CallableField
from benching.oracle_laws import conditioning
from benching.oracle_problems import REWARD_SCALE, Problem
from benching.oracle_training import Schedule

LOCAL_LINEAR = "memoryless_local_linear"


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes:
        title: for the page.
        method: key of `METHODS`.
        table: name of the training rollout's transitions.
        num_steps: K of a training rollout, on a uniform grid.
        settings: of the method, those that aren't its defaults.
        parts: what the method takes beside its settings: K' or the group that rewards are compared in.
        schedule: of the training.
    """

    title: str
    method: str
    table: str = "ode_euler"
    num_steps: int = 20
    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def transitions(self) -> Transitions:
        """The table of a training rollout."""
        return TRANSITIONS[self.table](uniform_sigmas(self.num_steps))

    @property
    def aims_at_tilt(self) -> bool:
        """Whether the method aims at the tilt, so that its velocity has a memoryless SDE to be sampled by."""
        return METHODS[self.method].aims_at_tilt


_UNMASKED: dict[str, Any] = {"mask_quantile": None}
_PUBLISHED = _UNMASKED | {"pairing": "left"}
_TO_THE_TILT = Schedule(learning_rate=0.0005, until_reward=True)
_FROM_THE_TILT = Schedule(from_tilt=True)
_LONGER = Schedule(iterations=600)
_VALUES = Schedule(batch=256)
_RAM = Schedule(batch=256, learning_rate=0.003)
_RENOISED: dict[str, Any] = {"score": "renoised", "sigma": 0.1}

VARIANTS: dict[str, Variant] = {
    "am_local_linear_10": Variant(
        "Adjoint Matching, local-linear, K = 10", "adjoint_matching", LOCAL_LINEAR, 10, _UNMASKED
    ),
    "am_local_linear_10_masked": Variant(
        "Adjoint Matching, local-linear, K = 10, mask .9", "adjoint_matching", LOCAL_LINEAR, 10
    ),
    "am_local_linear_40": Variant(
        "Adjoint Matching, local-linear, K = 40", "adjoint_matching", LOCAL_LINEAR, 40, _UNMASKED
    ),
    "am_published_10": Variant(
        "Adjoint Matching, published, K = 10", "adjoint_matching", "memoryless_euler", 10, _PUBLISHED
    ),
    "am_published_40": Variant(
        "Adjoint Matching, published, K = 40", "adjoint_matching", "memoryless_euler", 40, _PUBLISHED
    ),
    "buffered_am_10": Variant(
        "Buffered AM, local-linear, K = 10", "buffered_adjoint_matching", LOCAL_LINEAR, 10, _UNMASKED
    ),
    "eam_stopped": Variant("Efficient AM, stopped", "efficient_adjoint_matching", schedule=_LONGER),
    "eam_stopped_from_tilt": Variant(
        "Efficient AM, stopped, begun at the tilt", "efficient_adjoint_matching", schedule=_FROM_THE_TILT
    ),
    "eam_renoised": Variant(
        "Efficient AM, renoised", "efficient_adjoint_matching", settings=_RENOISED, schedule=_LONGER
    ),
    "eam_renoised_from_tilt": Variant(
        "Efficient AM, renoised, begun at the tilt",
        "efficient_adjoint_matching",
        settings=_RENOISED,
        schedule=_FROM_THE_TILT,
    ),
    "ram": Variant("RAM", "ram", parts={"group": 16}, schedule=_RAM),
    "flow_grpo": Variant("Flow-GRPO", "flow_grpo", LOCAL_LINEAR, 10, parts={"group": 16}, schedule=_VALUES),
    "deterministic_am": Variant("Deterministic AM", "deterministic_adjoint_matching", settings=_UNMASKED),
    "draft_1_stopped": Variant(
        "DRaFT-1, stopped at the tilt's reward", "draft", parts={"steps": 1}, schedule=_TO_THE_TILT
    ),
    "draft_1": Variant("DRaFT-1, to the end", "draft", parts={"steps": 1}),
    "draft_20_stopped": Variant(
        "DRaFT-20 (K' = K), stopped at the tilt's reward", "draft", parts={"steps": 20}, schedule=_TO_THE_TILT
    ),
    "draft_20": Variant("DRaFT-20 (K' = K), to the end", "draft", parts={"steps": 20}),
    "refl_stopped": Variant("ReFL, stopped at the tilt's reward", "refl", schedule=_TO_THE_TILT),
    "refl": Variant("ReFL, to the end", "refl"),
}


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
