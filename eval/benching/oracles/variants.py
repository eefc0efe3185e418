"""The methods as they are compared, each with its settings: one table; oracle_methods.py makes them.

What isn't set here is the default of the method's own settings. `reward_scale` is 1 (oracle_problems.py).
Masks are off where a method has one, as a masked loss has another optimum, but for one row with the default.
"""

from dataclasses import dataclass, field
from typing import Any

from am_diffusers.methods import METHODS
from am_diffusers.transitions import TRANSITIONS, Transitions, uniform_sigmas
from benching.oracles.training import Schedule

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
