"""Samplers of a velocity model as tables of numbers.

Every first-order sampler is

    x_next = x_coef[k] * x + v_coef[k] * velocity(x, sigma[k]) + std[k] * xi,        xi ~ N(0, I)

on a grid 1 = sigma[0] > ... > sigma[K] = 0, with `x = (1 - sigma) * clean + sigma * noise`. The ODE has
std = 0. The stochastic tables discretise the *memoryless* SDE of Adjoint Matching (arXiv 2409.08861,
section 4), which in t = 1 - sigma and u = -velocity reads

    dx = (2 u - x / t) dt + sqrt(2 (1 - t) / t) dW :

start and end of its trajectories are independent, which makes the tilted law the only optimum, and lets
the tuned model be sampled by any sampler afterwards. Their last step is deterministic (x_next = clean
estimate), so that the reward is taken at a noise-free image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FINAL_DROP = 8.0
"""Largest sigma[K-2] / sigma[K-1] for which a frozen velocity still removes the last step's noise."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """Coefficients of the K steps of a sampler, as float64 CPU tensors.

    They are applied as Python floats, so latents may have any dtype and device.

    Attributes:
        sigmas: noise levels, (K+1,), decreasing to 0.
        x_coef: factor of the state, (K,).
        v_coef: factor of the velocity, (K,), negative; of a control (reciprocal.py), positive.
        std: standard deviation of the noise added by a step, (K,), >= 0.

    Raises:
        ValueError: if the shapes disagree or a number is not finite.
    """

    sigmas: Tensor
    x_coef: Tensor
    v_coef: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        num_steps = len(self.sigmas) - 1
        for name in ("x_coef", "v_coef", "std"):
            value = getattr(self, name)
            if value.shape != (num_steps,) or not value.isfinite().all():
                raise ValueError(f"Transitions.{name}: expected {num_steps} finite numbers, got {value}")

    @property
    def num_steps(self) -> int:
        """Number K of steps."""
        return len(self.x_coef)

    def mean(self, k: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Mean of the next state after step `k` from `x` (B, ...) with `velocity` (B, ...)."""
        return self.x_coef[k].item() * x + self.v_coef[k].item() * velocity

    def step(self, k: int, x: Tensor, velocity: Tensor, noise: Tensor) -> Tensor:
        """Next state: `mean(k, x, velocity) + std[k] * noise`, all of shape (B, ...)."""
        return self.mean(k, x, velocity) + self.std[k].item() * noise

    def log_prob(self, k: int, x_next: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        """Log density of `x_next` after step `k`, summed over the latent dimensions, (B,).

        Raises:
            ValueError: if step `k` adds no noise.
        """
        std = self.std[k].item()
        if std == 0:
            raise ValueError(f"step {k} is deterministic (std = 0): it has no density")
        z = ((x_next - self.mean(k, x, velocity)) / std).flatten(1)
        return -0.5 * z.square().sum(1) - z.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(std))

    def path_kl(self, k: int, velocity_policy: Tensor, velocity_base: Tensor) -> Tensor:
        """KL divergence of step `k` of the policy against the base, (B,): |v_coef dv|^2 / (2 std^2).

        Exact for the discrete chain. Deterministic steps are skipped: 0.
        """
        std = self.std[k].item()
        if std == 0:
            return velocity_base.new_zeros(len(velocity_base))
        shift = self.v_coef[k].item() / std * (velocity_policy - velocity_base)
        return 0.5 * shift.flatten(1).square().sum(1)


class _Intervals(NamedTuple):
    """The steps of a grid: sigma `s` to `s_next` and t = 1 - sigma, (K,) each."""

    s: Tensor
    s_next: Tensor
    t: Tensor
    t_next: Tensor


def ode_euler(sigmas: Tensor) -> Transitions:
    """Euler steps of the probability-flow ODE, x_next = x + (sigma_next - sigma) * velocity.

    Equal to `FlowMatchEulerDiscreteScheduler.step` of Diffusers.

    Args:
        sigmas: (K+1,), K >= 1, strictly decreasing from at most 1 to 0.

    Raises:
        ValueError: on any other grid.
    """
    sigmas = _checked(sigmas, min_steps=1)
    return Transitions(sigmas, torch.ones_like(sigmas[1:]), sigmas.diff(), torch.zeros_like(sigmas[1:]))


def memoryless_euler(sigmas: Tensor) -> Transitions:
    """Euler-Maruyama steps of the memoryless SDE as published (arXiv 2409.08861 and its code).

    1/t is regularised to 1/(t + h). Over-dispersed at few steps; kept for comparison.

    Args:
        sigmas: (K+1,), K >= 2, strictly decreasing from 1 to 0.

    Raises:
        ValueError: on any other grid.
    """
    sigmas, (s, _, t, t_next) = _stochastic_grid(sigmas)
    _check_final_drop(sigmas)
    h = t_next - t
    return _ending_in_clean(sigmas, 1 - h / (t + h), -2 * h, 2 * h * (s + h) / (t + h))


def memoryless_local_linear(sigmas: Tensor) -> Transitions:
    """Return the memoryless SDE integrated exactly over each step with the velocity frozen (the default).

    d(t x) = 2 t u dt + sqrt(2 t (1 - t)) dW has no singularity at sigma = 1.

    Args:
        sigmas: (K+1,), K >= 2, strictly decreasing from 1 to 0.

    Raises:
        ValueError: on any other grid.
    """
    sigmas, (_, _, t, t_next) = _stochastic_grid(sigmas)
    _check_final_drop(sigmas)
    variance = (t_next**2 - t**2 - (2 / 3) * (t_next**3 - t**3)) / t_next**2
    return _ending_in_clean(sigmas, t / t_next, -(t_next**2 - t**2) / t_next, variance)


def ancestral(sigmas: Tensor) -> Transitions:
    """Ancestral steps (DDIM with eta = 1 for flows, arXiv 2010.02502, section 4): clean estimate frozen.

    x_next = t' clean + s' (rho noise + sqrt(1 - rho^2) xi), rho = s' t / (s t'). Memoryless exactly.

    Args:
        sigmas: (K+1,), K >= 2, strictly decreasing from 1 to 0.

    Raises:
        ValueError: on any other grid.
    """
    sigmas, (s, s_next, t, t_next) = _stochastic_grid(sigmas)
    rho = s_next * t / (s * t_next)
    variance = s_next**2 * (1 - rho**2)
    return _ending_in_clean(sigmas, t_next + s_next * rho, s_next * rho * t - t_next * s, variance)


TRANSITIONS: dict[str, Callable[[Tensor], Transitions]] = {
    "ode_euler": ode_euler,
    "memoryless_euler": memoryless_euler,
    "memoryless_local_linear": memoryless_local_linear,
    "ancestral": ancestral,
}


def uniform_sigmas(num_steps: int) -> Tensor:
    """Return the uniform grid 1, 1 - 1/K, ..., 0 of K = `num_steps` steps, (K+1,) float64."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """Return the uniform grid under the shift s -> shift * s / (1 + (shift - 1) * s), (K+1,) float64.

    Equal to `FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(sigmas=linspace(1, 1/K, K))`
    (SD3, arXiv 2403.03206, section 5.3.2); SD3 uses shift 3.
    """
    s = uniform_sigmas(num_steps)
    return shift * s / (1 + (shift - 1) * s)


def jitter_sigmas(sigmas: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Grid with each interior node moved uniformly by up to `amount` of its smaller gap, (K+1,) float64.

    A new grid per iteration trains the velocity at every sigma instead of at K points.

    Args:
        sigmas: (K+1,), strictly decreasing.
        amount: in [0, 0.5), which keeps the grid strictly decreasing.
        generator: CPU generator; K-1 numbers are drawn.

    Raises:
        ValueError: if `amount` is outside [0, 0.5).
    """
    if not 0 <= amount < 0.5:
        raise ValueError(f"sigma jitter must be in [0, 0.5) of the gap between nodes, got {amount}")
    sigmas = sigmas.to(torch.float64)
    gaps = -sigmas.diff()
    room = torch.minimum(gaps[:-1], gaps[1:])
    move = 2 * torch.rand(len(room), generator=generator, dtype=torch.float64) - 1
    return torch.cat([sigmas[:1], sigmas[1:-1] + amount * room * move, sigmas[-1:]])


def _checked(sigmas: Tensor, *, min_steps: int) -> Tensor:
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if sigmas.ndim != 1 or len(sigmas) < min_steps + 1:
        raise ValueError(
            f"expected at least {min_steps + 1} sigmas in one dimension, got {tuple(sigmas.shape)}"
        )
    if not (sigmas.diff() < 0).all() or sigmas[-1] != 0 or sigmas[0] > 1:
        raise ValueError(f"sigmas must decrease strictly from at most 1 to 0, got {sigmas.tolist()}")
    return sigmas


def _stochastic_grid(sigmas: Tensor) -> tuple[Tensor, _Intervals]:
    sigmas = _checked(sigmas, min_steps=2)
    if sigmas[0] != 1:
        raise ValueError(f"a stochastic table starts from pure noise: sigmas[0] must be 1, got {sigmas[0]}")
    s, s_next = sigmas[:-1], sigmas[1:]
    return sigmas, _Intervals(s, s_next, 1 - s, 1 - s_next)


def _check_final_drop(sigmas: Tensor) -> None:
    # With the velocity frozen, noise added on the way into a tiny sigma is never removed again.
    if len(sigmas) > 2 and sigmas[-3] > MAX_FINAL_DROP * sigmas[-2]:
        raise ValueError(
            f"the noise of the step from sigma {sigmas[-3]:.4f} to {sigmas[-2]:.4f} would stay "
            "in the image; use uniform_sigmas or shifted_sigmas (grids ending .0089, 0 are for the ODE)"
        )


def _ending_in_clean(sigmas: Tensor, x_coef: Tensor, v_coef: Tensor, variance: Tensor) -> Transitions:
    """Transitions whose last step is the clean estimate x - sigma * velocity, without noise."""
    x_coef = torch.cat([x_coef[:-1], torch.ones_like(x_coef[-1:])])
    v_coef = torch.cat([v_coef[:-1], -sigmas[-2:-1]])
    std = torch.cat([variance[:-1].sqrt(), torch.zeros_like(variance[-1:])])
    return Transitions(sigmas, x_coef, v_coef, std)
