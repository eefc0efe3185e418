"""Schedulers of Diffusers: the noise levels of a pipeline's own, and others of its family as solvers.

Which are fit was measured on a Gaussian law, whose ODE has a closed form (tests/models/test_schedulers.py).
Not fit are those whose last step ends above sigma 0 with flow sigmas (DEIS, SA-Solver), which leaves noise in
the image, and those that don't take a velocity.
"""

import inspect
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from am_diffusers.models.family import Config, Family, Shape
from am_diffusers.rollout import Solution, Solver, TableSolver
from am_diffusers.transitions import TRANSITIONS
from am_diffusers.velocity import Conditioning, VelocityField

# For diffusion and flow models alike: told that this is a flow. `lower_order_final` is the default of all but
# the singlestep solver, which Diffusers would switch to it with a warning.
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "lower_order_final": True}
# By class name: the argument that takes the shift of the noise levels, and what else is set.
SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
    "FlowMatchEulerDiscreteScheduler": ("shift", {}),
    "FlowMatchHeunDiscreteScheduler": ("shift", {}),
    "FlowMatchLCMScheduler": ("shift", {}),  # stochastic, for models distilled for it
    "UniPCMultistepScheduler": ("flow_shift", _FLOW),
    "DPMSolverMultistepScheduler": ("flow_shift", _FLOW),
    "DPMSolverSinglestepScheduler": ("flow_shift", _FLOW),
}


_EULER = "FlowMatchEulerDiscreteScheduler"
# Settings that make other levels than a shift of an even grid.
_BESIDES_SHIFT = (
    *("shift_terminal", "invert_sigmas"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of a pipeline, from its configurations alone.

    Attributes:
        family: the pipeline's family.
        scheduler: the pipeline's scheduler; left as it is.
        config: the configuration of a component by its name.
    """

    family: Family
    scheduler: Any
    config: Config

    def sigmas(self, num_steps: int, shape: Shape, *, stochastic: bool) -> Tensor:
        """Return levels (num_steps + 1,), 1 to 0, for latents of a shape, see `Family.sigmas`.

        Raises:
            ValueError: if the scheduler has none for stochastic tables.
        """
        mu = self.family.mu(self.config, shape, num_steps)
        return self.family.sigmas(self.scheduler, num_steps, mu, stochastic)

    def solver(self, name: str, num_steps: int, shape: Shape) -> Solver:
        """Return a solver for latents of a shape: a table of `TRANSITIONS`, or a class of `SCHEDULERS`.

        Raises:
            ValueError: for any other name (lists those that fit), too few steps for the solver, or noise
                levels that it can't do with.
        """
        check_solver(name, num_steps)
        if name not in TRANSITIONS:
            mu = self.family.mu(self.config, shape, num_steps)
            return make_solver(self.scheduler, name, num_steps, mu)
        sigmas = self.sigmas(num_steps, shape, stochastic=name != "ode_euler")
        return TableSolver(TRANSITIONS[name](sigmas))


def scheduler_sigmas(scheduler: Any, num_steps: int, mu: float | None, stochastic: bool) -> Tensor:
    """Return a scheduler's own levels, or for stochastic tables its shift of an even grid; see `Family`.

    These go without `shift_terminal`: the noise of its last level would stay in the image.
    """
    if stochastic:
        scheduler = deepcopy(scheduler)
        scheduler.register_to_config(shift_terminal=None)
        scheduler, mu = _scheduler(scheduler, _EULER, mu)
        extra: dict[str, Any] = {"sigmas": np.linspace(1, 1 / num_steps, num_steps).tolist()}
    else:
        extra = {}
    return _with_timesteps(scheduler, num_steps, mu, extra).sigmas.double()


def check_solver(name: str, num_steps: int) -> None:
    """Raise a ValueError unless a solver is known and makes so few steps; it lists those that fit."""
    if name not in TRANSITIONS and name not in SCHEDULERS:
        kind = "isn't fit for flow models" if hasattr(diffusers, name) else "is unknown"
        fit = ", ".join([*TRANSITIONS, *SCHEDULERS])
        raise ValueError(f"the sampler {name!r} {kind}: expected one of {fit}")
    least = 1 if name in SCHEDULERS or name == "ode_euler" else 2  # the last step of an SDE is deterministic
    if num_steps < least:
        raise ValueError(f"number of steps of the sampler {name}: expected at least {least}, got {num_steps}")


def make_solver(own: Any, name: str, num_steps: int, mu: float | None = None) -> Solver:
    """Return a class of `SCHEDULERS` as a solver, with the shift of `own`, the pipeline's scheduler.

    It calls the network `num_steps` times an image, K; a scheduler of order 2 makes 2 K - 1 calls. `mu` is
    the shift of an `own` with dynamic shifting, see `Family`.
    """
    check_solver(name, num_steps)
    scheduler, mu = _scheduler(own, name, mu)
    return SchedulerSolver(scheduler, num_steps, mu)


@dataclass(frozen=True)
class SchedulerSolver:
    """The steps of a scheduler, as Diffusers' pipelines take them. It has no path KL.

    Attributes:
        scheduler: left as it is; every call steps a copy.
        num_steps: K.
        mu: shift of a scheduler with dynamic shifting; None = it is fixed.
    """

    scheduler: Any
    num_steps: int
    mu: float | None = None

    @torch.no_grad()
    def __call__(
        self,
        field: VelocityField,
        cond: Conditioning,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        *,
        base: VelocityField | None = None,
    ) -> Solution:
        """See `Solver`; `base` is not used."""
        scheduler = _with_timesteps(self.scheduler, self.num_steps, self.mu, {"device": noise.device})
        # Else a scheduler looks for its place by a rounded timestep, which many steps have twice.
        scheduler.set_begin_index(0)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": list(generators)} if takes_generator else {}
        x = noise
        for timestep in scheduler.timesteps:
            sigma = x.new_full((len(x),), float(timestep) / scheduler.config.num_train_timesteps)
            (x,) = scheduler.step(field(x, sigma, cond), timestep, x, return_dict=False, **extra)
        return Solution(x, None)


def _with_timesteps(scheduler: Any, num_steps: int, mu: float | None, more: dict[str, Any]) -> Any:
    """Return a copy of a scheduler that is ready for `num_steps` steps; `more` arguments say how."""
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, **more, **({} if mu is None else {"mu": mu}))
    return scheduler


def _scheduler(own: Any, name: str, mu: float | None) -> tuple[Any, float | None]:
    """Return the pipeline's scheduler where it is the one, or another with its shift, and the `mu` to set."""
    if type(own).__name__ == name:
        return own, mu
    shift, extra = SCHEDULERS[name]
    settings = {"num_train_timesteps": own.config.num_train_timesteps, shift: _shift(own, name, mu), **extra}
    return getattr(diffusers, name)(**settings), None


def _shift(own: Any, name: str, mu: float | None) -> float:
    """Return the fixed shift that makes the levels of a scheduler, to give to another."""
    config = own.config
    shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift")
    if config.get("use_dynamic_shifting"):
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        shift = math.exp(mu) if exponential and mu is not None else mu
    besides = [setting for setting in _BESIDES_SHIFT if config.get(setting)]
    if shift is None or besides:
        reason = f"its levels follow {besides[0]}" if besides else "it has no shift"
        raise ValueError(
            f"the model's {type(own).__name__} has no shift of noise levels to give to {name} ({reason}): "
            f"sample with {type(own).__name__}, train with a scheduler_config.json of {_EULER}"
        )
    return shift
