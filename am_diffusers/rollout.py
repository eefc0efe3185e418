"""Running a velocity field through a transition table, and the noise that drives it.

    x_{k+1} = x_coef[k] * x_k + v_coef[k] * velocity(x_k, sigma[k]) + std[k] * xi_k

`rollout` records what training needs: x_0 .. x_{K-1} and the policy's velocities at 0 .. K-2. The last
step is taken with the *base* velocity by the adjoint sweep, whose first pass computes it anyway
(adjoint.py). `sample` runs all K steps with one field: the ODE, or the plain SDE, of evaluation;
`sample_ode` is the ODE to second order, for few steps.

Noise is a function of (seed, iteration, sample id), drawn on the CPU: neither the number of processes
nor the split into batches changes it, and a resumed run needs no generator state.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States of a rollout before its last step, without gradients.

    Attributes:
        latents: x_0 (noise) .. x_{K-1}, (K, B, ...).
        velocities: the rollout policy's velocities at x_0 .. x_{K-2}, (K-1, B, ...).
        transitions: the table of K steps that was run.
        cond: conditioning of the B samples.

    Raises:
        ValueError: if the shapes disagree.
    """

    latents: Tensor
    velocities: Tensor
    transitions: Transitions
    cond: Conditioning

    def __post_init__(self) -> None:
        expected = (self.transitions.num_steps, len(self.cond))
        if self.latents.shape[:2] != expected or self.velocities.shape != self.latents[1:].shape:
            raise ValueError(
                f"Trajectory: expected latents {expected} + latent shape and one velocity less, got "
                f"{tuple(self.latents.shape)} and {tuple(self.velocities.shape)}"
            )

    def at(self, k: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Arguments of a velocity field at step `k`: x_k (B, ...), sigma (B,), cond."""
        x = self.latents[k]
        return x, noise_level(self.transitions, k, x), self.cond


def noise_level(transitions: Transitions, k: int, x: Tensor) -> Tensor:
    """sigma[k] once per sample of `x` (B, ...), in its dtype and on its device, (B,)."""
    return x.new_full((len(x),), transitions.sigmas[k].item())


@torch.no_grad()
def rollout(
    policy: VelocityField,
    transitions: Transitions,
    cond: Conditioning,
    noise: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Trajectory:
    """Steps 0 .. K-2 of the policy from `noise`: K-1 calls of `policy`, no gradient.

    Args:
        policy: field that is followed.
        transitions: table of K >= 2 steps.
        cond: conditioning, B rows.
        noise: x_0 ~ N(0, I), (B, ...).
        step_noise: noise of step k, like `noise`; called for k = 0 .. K-2 in this order.
    """
    latents, velocities = [noise], []
    for k in range(transitions.num_steps - 1):
        x = latents[-1]
        velocities.append(policy(x, noise_level(transitions, k, x), cond))
        latents.append(transitions.step(k, x, velocities[-1], step_noise(k)))
    return Trajectory(torch.stack(latents), torch.stack(velocities), transitions, cond)


@torch.no_grad()
def sample(
    policy: VelocityField,
    transitions: Transitions,
    cond: Conditioning,
    noise: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    *,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """All K steps of the policy from `noise`: final latents, (B, ...).

    Args:
        policy: field that is followed, K calls.
        transitions: table of K steps.
        cond: conditioning, B rows.
        noise: x_0 ~ N(0, I), (B, ...).
        step_noise: noise of step k, like `noise`; called for the steps with std > 0 only.
        watch: sees (k, x_k, velocity of the policy there) of every step.

    Raises:
        ValueError: if the table is stochastic and `step_noise` is missing.
    """
    if step_noise is None and transitions.std.any():
        raise ValueError("a stochastic table needs `step_noise`; for the ODE pass ode_euler(sigmas)")
    x = noise
    for k in range(transitions.num_steps):
        velocity = policy(x, noise_level(transitions, k, x), cond)
        if watch is not None:
            watch(k, x, velocity)
        mean = transitions.mean(k, x, velocity)
        std = transitions.std[k].item()
        x = mean + std * step_noise(k) if step_noise is not None and std > 0 else mean
    return x


@torch.no_grad()
def sample_ode(policy: VelocityField, sigmas: Tensor, cond: Conditioning, noise: Tensor) -> Tensor:
    """End of the policy's ODE by the Adams-Bashforth method of order 2, its first step Euler's, (B, ...).

    One call a step, like Euler's method, whose error at few steps shrinks the spread of the end points.

    Args:
        policy: field that is followed, K calls.
        sigmas: (K+1,), strictly decreasing; it may end above 0.
        cond: conditioning, B rows.
        noise: state at sigmas[0], (B, ...).
    """
    x, before, h_before = noise, noise, 1.0
    for k, (sigma, h) in enumerate(zip(sigmas.tolist(), sigmas.diff().tolist(), strict=False)):
        velocity = policy(x, x.new_full((len(x),), sigma), cond)
        ahead = 0.5 * h / h_before * (velocity - before) if k else 0.0
        x, before, h_before = x + h * (velocity + ahead), velocity, h
    return x


def generator_for(*key: int | str) -> torch.Generator:
    """CPU generator seeded by the SHA-256 of `key`, for instance (seed, iteration, "shared")."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def generators_for(seed: int, iteration: int, sample_ids: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample: noise = f(seed, iteration, sample id)."""
    return [generator_for(seed, iteration, int(i)) for i in sample_ids]


@dataclass(frozen=True)
class LatentSpec:
    """Shape of one latent, for instance (16, 64, 64), and where and in what precision states are kept."""

    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal latents, row i from generator i, (len(generators), *shape)."""
        return draw(generators, self.shape, self.dtype).to(self.device)


def draw(
    generators: Sequence[torch.Generator], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers on the CPU, row i from generator i, (len(generators), *shape)."""
    return torch.stack([torch.randn(tuple(shape), generator=g, dtype=dtype) for g in generators])
