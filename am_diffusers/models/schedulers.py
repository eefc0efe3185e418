"""Schedulers of Diffusers: the noise levels of a pipeline's own, and others of its family as solvers.

Which are fit was measured on a Gaussian law, whose ODE has a closed form (tests/models/test_schedulers.py).
Not fit are those whose last step ends above sigma 0 with flow sigmas (DEIS, SA-Solver), which leaves noise in
the picture, and those that don't take a velocity.
"""

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

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


def own_sigmas(scheduler: Any, num_steps: int) -> Tensor:
    """A scheduler's own noise levels (num_steps + 1,), float64, 1 to 0."""
    return _sigmas(scheduler, num_steps, None)


def even_sigmas(scheduler: Any, num_steps: int) -> Tensor:
    """A scheduler's shift of an even grid (num_steps + 1,), float64, 1 to 0."""
    return _sigmas(scheduler, num_steps, np.linspace(1, 1 / num_steps, num_steps).tolist())


def check_solver(name: str) -> None:
    """Raise ValueError unless `make_solver` knows `name`; lists those that fit."""
    if name not in TRANSITIONS and name not in SCHEDULERS:
        kind = "isn't fit for flow models" if hasattr(diffusers, name) else "is unknown"
        fit = ", ".join([*TRANSITIONS, *SCHEDULERS])
        raise ValueError(f"the sampler {name!r} {kind}: expected one of {fit}")


def make_solver(own: Any, name: str, num_steps: int) -> Solver:
    """A solver of `num_steps` steps by name.

    Args:
        own: the pipeline's scheduler; others get its shift.
        name: a table of `TRANSITIONS`, on the noise levels that suit it, or a class of `SCHEDULERS`.
        num_steps: steps K; calls of the network a picture, but a scheduler of order 2 makes 2 K - 1.

    Raises:
        ValueError: for any other name (lists those that fit), or too few steps for the solver.
    """
    check_solver(name)
    if num_steps < 1:
        raise ValueError(f"expected at least 1 sampling step, got {num_steps}")
    if name in TRANSITIONS:
        sigmas = own_sigmas if name == "ode_euler" else even_sigmas
        return TableSolver(TRANSITIONS[name](sigmas(own, num_steps)))
    return SchedulerSolver(_scheduler(own, name), num_steps)


@dataclass(frozen=True)
class SchedulerSolver:
    """The steps of a scheduler, as `StableDiffusion3Pipeline` takes them. It has no path KL.

    Attributes:
        scheduler: left as it is; every call steps a copy.
        num_steps: K.
    """

    scheduler: Any
    num_steps: int

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
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(self.num_steps, device=noise.device)
        # Else a scheduler looks for its place by a rounded timestep, which many steps have twice.
        scheduler.set_begin_index(0)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": list(generators)} if takes_generator else {}
        x = noise
        for timestep in scheduler.timesteps:
            sigma = x.new_full((len(x),), float(timestep) / scheduler.config.num_train_timesteps)
            (x,) = scheduler.step(field(x, sigma, cond), timestep, x, return_dict=False, **extra)
        return Solution(x, None)


def _scheduler(own: Any, name: str) -> Any:
    """The pipeline's scheduler where it is the one, with all its settings, or another with its shift."""
    if type(own).__name__ == name:
        return own
    shift, extra = SCHEDULERS[name]
    config = own.config
    if config.get("shift") is None or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"the model's {type(own).__name__} has no fixed shift of noise levels to give to {name}: use "
            f"{type(own).__name__}"
        )
    settings = {"num_train_timesteps": config.num_train_timesteps, shift: config.shift, **extra}
    return getattr(diffusers, name)(**settings)


def _sigmas(scheduler: Any, num_steps: int, sigmas: list[float] | None) -> Tensor:
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, sigmas=sigmas)
    return scheduler.sigmas.double()
