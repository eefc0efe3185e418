"""Schedulers of Diffusers: the noise levels of a pipeline's own, and others of its family as solvers.

Which are fit was measured on a Gaussian law, whose ODE has a closed form (tests/models/test_schedulers.py).
Not fit are those whose last step ends above sigma 0 with flow sigmas (DEIS, SA-Solver), which leaves noise in
the image, and those that don't take a velocity.
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

from am_diffusers.models.family import Shape
from am_diffusers.rollout import Solution, Solver
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


def static_sigmas(scheduler: Any, num_steps: int, shape: Shape, stochastic: bool) -> Tensor:
    """Return a scheduler's own levels, or for stochastic tables its shift of an even grid, for any shape."""
    scheduler, grid = deepcopy(scheduler), np.linspace(1, 1 / num_steps, num_steps).tolist()
    scheduler.set_timesteps(num_steps, sigmas=grid if stochastic else None)
    return scheduler.sigmas.double()


def check_solver(name: str, num_steps: int) -> None:
    """Raise a ValueError unless a solver is known and makes so few steps; it lists those that fit."""
    if name not in TRANSITIONS and name not in SCHEDULERS:
        kind = "isn't fit for flow models" if hasattr(diffusers, name) else "is unknown"
        fit = ", ".join([*TRANSITIONS, *SCHEDULERS])
        raise ValueError(f"the sampler {name!r} {kind}: expected one of {fit}")
    least = 1 if name in SCHEDULERS or name == "ode_euler" else 2  # the last step of an SDE is deterministic
    if num_steps < least:
        raise ValueError(f"number of steps of the sampler {name}: expected at least {least}, got {num_steps}")


def make_solver(own: Any, name: str, num_steps: int) -> Solver:
    """Return a class of `SCHEDULERS` as a solver, with the shift of `own`, the pipeline's scheduler.

    It calls the network `num_steps` times an image, K; a scheduler of order 2 makes 2 K - 1 calls.
    """
    check_solver(name, num_steps)
    return SchedulerSolver(_scheduler(own, name), num_steps)


@dataclass(frozen=True)
class SchedulerSolver:
    """The steps of a scheduler, as Diffusers' pipelines take them. It has no path KL.

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
    """Return the pipeline's scheduler where it is the one, with its settings, or another with its shift."""
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
