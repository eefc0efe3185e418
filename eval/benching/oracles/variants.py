"""The methods as they are compared, each with its settings: one table.

What isn't set here is the default of the method's own settings. `reward_scale` is 1 (oracle_problems.py).
Masks are off, as a masked loss has another optimum, but for one row.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from am_diffusers.methods import METHODS, Method
from am_diffusers.methods.parts.settings import FOR_ALL, SharedSettings
from am_diffusers.methods.parts.surroundings import Sizes, Surroundings
from am_diffusers.noise import LatentSpec
from am_diffusers.transitions import uniform_sigmas
from am_diffusers.velocity import CallableField
from benching.oracles.laws import Sampler
from benching.oracles.problems import REWARD_SCALE, Problem
from benching.oracles.training import Schedule

LOCAL_LINEAR = "memoryless_local_linear"
NO_REWEIGHTING = ("deterministic_adjoint_matching", "draft", "refl")
"""Methods that move or push images: no memoryless SDE belongs to their velocity."""


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes:
        title: title on the page.
        method: key of `METHODS`.
        shared: flags of `SharedSettings` that aren't the defaults.
        own: the method's own flags that aren't the defaults.
        schedule: schedule of the training.
    """

    title: str
    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def make(self, policy: CallableField, problem: Problem) -> Method:
        """Make the method, of its real class, around a field in closed form."""
        around = Surroundings(
            policy,
            problem.law.field(),
            problem.reward,
            LatentSpec((problem.dim,), dtype=torch.float64),
            lambda steps, noisy: uniform_sigmas(steps),
            sizes=Sizes(batch=self.schedule.batch),
            iterations=self.schedule.iterations,
        )
        shared, own = self._settings()
        return METHODS[self.method](around, shared, own)

    def resolved(self) -> dict[str, Any]:
        """Return all flags that the method reads, defaults too, for JSON: what a result depends on."""
        shared, own = self._settings()
        names = {*METHODS[self.method].reads, *FOR_ALL} - {"target_kl"}  # reward_scale is a number
        return {name: value for name, value in asdict(shared).items() if name in names} | asdict(own)

    @property
    def samplers(self) -> list[Sampler]:
        """Samplers of the law: the memoryless SDE too if the method is to reweight the base."""
        return ["ode"] if self.method in NO_REWEIGHTING else ["sde", "ode"]

    def _settings(self) -> tuple[SharedSettings, Any]:
        shared = SharedSettings(reward_scale=REWARD_SCALE, **self.shared)
        return shared, METHODS[self.method].Settings(**self.own)


def _steps(number: int) -> dict[str, Any]:
    """Return flags of a rollout of `number` local-linear steps, each continued once, without a mask."""
    return {
        "num_inference_steps": number,
        "transitions": LOCAL_LINEAR,
        "tail_samples": 1,
        "mask_quantile": None,
    }


_PUBLISHED: dict[str, Any] = {"transitions": "memoryless_euler", "pairing": "left"}
_BRANCHED: dict[str, Any] = {"tail_samples": 4}
_UNMASKED: dict[str, Any] = {"mask_quantile": None}
_GROUPS: dict[str, Any] = {"samples_per_prompt": 16}
_BUFFER: dict[str, Any] = {"buffer_size": 4 * Schedule().batch, "buffer_refresh": 4}
_TO_THE_TILT = Schedule(learning_rate=0.0005, until_reward=True)
_FROM_THE_TILT = Schedule(from_tilt=True)
_LONGER = Schedule(iterations=600)
_VALUES = Schedule(batch=256)
_RAM = Schedule(batch=256, learning_rate=0.003)
_RENOISED: dict[str, Any] = {"eam_score": "renoised", "eam_sigma": 0.1}

VARIANTS: dict[str, Variant] = {
    "am_local_linear_10": Variant("Adjoint Matching, local-linear, K = 10", "adjoint_matching", _steps(10)),
    "am_local_linear_10_masked": Variant(
        "Adjoint Matching, local-linear, K = 10, mask .9",
        "adjoint_matching",
        _steps(10) | {"mask_quantile": 0.9},
    ),
    "am_branched_10": Variant(
        "Adjoint Matching, local-linear, K = 10, M = 4", "adjoint_matching", _steps(10) | _BRANCHED
    ),
    "am_crossfit_10": Variant(
        "Adjoint Matching, local-linear, K = 10, M = 4, crossfit",
        "adjoint_matching",
        _steps(10) | _BRANCHED | {"row_weights": "crossfit"},
    ),
    "am_ramp_10": Variant(
        "Adjoint Matching, local-linear, K = 10, M = 4, ramp",
        "adjoint_matching",
        _steps(10) | _BRANCHED | {"row_weights": "ramp"},
    ),
    "am_ode_tail_1_10": Variant(
        "Adjoint Matching, local-linear, K = 10, ODE tail of 1",
        "adjoint_matching",
        _steps(10) | {"ode_tail": 1},
    ),
    "am_ode_tail_3_10": Variant(
        "Adjoint Matching, local-linear, K = 10, ODE tail of 3",
        "adjoint_matching",
        _steps(10) | {"ode_tail": 3},
    ),
    "am_local_linear_40": Variant("Adjoint Matching, local-linear, K = 40", "adjoint_matching", _steps(40)),
    "am_published_10": Variant(
        "Adjoint Matching, published, K = 10",
        "adjoint_matching",
        _steps(10) | _PUBLISHED,
    ),
    "am_published_40": Variant(
        "Adjoint Matching, published, K = 40",
        "adjoint_matching",
        _steps(40) | _PUBLISHED,
    ),
    "buffered_am_10": Variant(
        "Buffered AM, local-linear, K = 10", "buffered_adjoint_matching", _steps(10), _BUFFER
    ),
    "eam_stopped": Variant("Efficient AM, stopped", "efficient_adjoint_matching", schedule=_LONGER),
    "eam_stopped_from_tilt": Variant(
        "Efficient AM, stopped, begun at the tilt", "efficient_adjoint_matching", schedule=_FROM_THE_TILT
    ),
    "eam_renoised": Variant(
        "Efficient AM, renoised", "efficient_adjoint_matching", own=_RENOISED, schedule=_LONGER
    ),
    "eam_renoised_from_tilt": Variant(
        "Efficient AM, renoised, begun at the tilt",
        "efficient_adjoint_matching",
        own=_RENOISED,
        schedule=_FROM_THE_TILT,
    ),
    "ram": Variant("RAM", "ram", _GROUPS, schedule=_RAM),
    "reward_weighted": Variant(
        "Reward-weighted matching",
        "reward_weighted_matching",
        _GROUPS | {"num_inference_steps": 20},
        schedule=_RAM,
    ),
    "flow_grpo": Variant("Flow-GRPO", "flow_grpo", _GROUPS | {"num_inference_steps": 10}, schedule=_VALUES),
    "deterministic_am": Variant("Deterministic AM", "deterministic_adjoint_matching", _UNMASKED),
    "draft_1_stopped": Variant("DRaFT-1, stopped at the tilt's reward", "draft", schedule=_TO_THE_TILT),
    "draft_1": Variant("DRaFT-1, to the end", "draft"),
    "draft_20_stopped": Variant(
        "DRaFT-20 (K' = K), stopped at the tilt's reward",
        "draft",
        own={"draft_steps": 20},
        schedule=_TO_THE_TILT,
    ),
    "draft_20": Variant("DRaFT-20 (K' = K), to the end", "draft", own={"draft_steps": 20}),
    "refl_stopped": Variant("ReFL, stopped at the tilt's reward", "refl", schedule=_TO_THE_TILT),
    "refl": Variant("ReFL, to the end", "refl"),
}
