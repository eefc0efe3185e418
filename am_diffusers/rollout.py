"""A velocity field run through a transition table: trajectories to train on, and end points of images.

    x_{k+1} = x_coef[k] * x_k + v_coef[k] * velocity(x_k, sigma[k]) + std[k] * xi_k

`rollout` records what training needs: x_0 .. x_{K-1} and the policy's velocities at 0 .. K-2. The last
step is taken with the *base* velocity by the adjoint sweep, whose first pass computes it anyway
(adjoint.py). `sample` runs all K steps with one field: the ODE, or the plain SDE, of evaluation;
`sample_ode` is the ODE to second order, for few steps.

A `Solver` carries noise to final latents when images are made: a table is one, Diffusers schedulers are
others (models/schedulers.py). Stochastic ones draw the noise of their steps from one generator a row, so that
neither batch size nor the number of processes changes it. The path KL of a stochastic table is

    sum over steps k of KL(policy's step k || base's step k) at the policy's own states,

whose expectation over the policy's noise is the KL divergence of its trajectories from those of the base.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from am_diffusers.noise import draw
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
) -> Tensor:
    """Run all K steps of the policy from `noise`: final latents, (B, ...).

    Args:
        policy: field that is followed, K calls.
        transitions: table of K steps.
        cond: conditioning, B rows.
        noise: x_0 ~ N(0, I), (B, ...).
        step_noise: noise of step k, like `noise`; called for the steps with std > 0 only.

    Raises:
        ValueError: if the table is stochastic and `step_noise` is missing.
    """
    x = noise
    for x in states(policy, transitions, cond, noise, step_noise):  # noqa: B007 - only the last is wanted
        pass
    return x


@torch.no_grad()
def states(
    policy: VelocityField,
    transitions: Transitions,
    cond: Conditioning,
    noise: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield x_1 .. x_K, (B, ...) each; arguments and errors are those of `sample`."""
    if step_noise is None and transitions.std.any():
        raise ValueError("a stochastic table needs `step_noise`; for the ODE pass ode_euler(sigmas)")
    x = noise
    for k in range(transitions.num_steps):
        velocity = policy(x, noise_level(transitions, k, x), cond)
        mean = transitions.mean(k, x, velocity)
        std = transitions.std[k].item()
        x = mean + std * step_noise(k) if step_noise is not None and std > 0 else mean
        yield x


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


class Solution(NamedTuple):
    """Final latents (B, ...), and their path KL (B,) in nats, float64 on the CPU, where it was taken."""

    latents: Tensor
    path_kl: Tensor | None


class Solver(Protocol):
    """Noise to final latents, by a velocity field."""

    def __call__(
        self,
        field: VelocityField,
        cond: Conditioning,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        *,
        base: VelocityField | None = None,
    ) -> Solution:
        """Latents that `field` makes of `noise`.

        Args:
            field: what is followed, with its guidance.
            cond: conditioning, B rows.
            noise: starting noise, (B, ...).
            generators: B, of the noise of the steps; a deterministic solver leaves them alone.
            base: take the path KL against this field, with the same guidance, and as in training its last
                step: as many calls of it as there are steps. A solver without transition densities takes
                    none.
        """
        ...


@dataclass(frozen=True)
class TableSolver:
    """The steps of a table, deterministic or stochastic."""

    transitions: Transitions

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
        """See `Solver`: K calls of `field`; path KL of stochastic tables only."""

        def step_noise(_: int) -> Tensor:
            return draw(generators, noise.shape[1:], noise.dtype).to(noise.device)

        if base is not None and self.transitions.std.any():
            return chain(field, base, self.transitions, cond, noise, step_noise)
        return Solution(sample(field, self.transitions, cond, noise, step_noise), None)


def chain(
    policy: VelocityField,
    base: VelocityField,
    transitions: Transitions,
    cond: Conditioning,
    noise: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Solution:
    """Run the chain of training, whose last step is the base's: K-1 calls of the policy, K of the base.

    The last step adds no noise: the images are no farther from the base's than the path KL, in nats, only if
    both take it alike.

    Args:
        policy: field that is followed.
        base: field that the path KL is against.
        transitions: stochastic table of K steps.
        cond: conditioning, B rows.
        noise: x_0 ~ N(0, I), (B, ...).
        step_noise: noise of step k, like `noise`; called for k = 0 .. K-2 in this order.
    """
    last = transitions.num_steps - 1
    trajectory = rollout(policy, transitions, cond, noise, step_noise)
    with torch.no_grad():
        terms = [
            transitions.path_kl(k, trajectory.velocities[k], base(*trajectory.at(k)))
            for k in range(last)
            if transitions.std[k] > 0
        ]
        final = transitions.mean(last, trajectory.latents[last], base(*trajectory.at(last)))
    return Solution(final, torch.stack(terms).cpu().double().sum(0))
