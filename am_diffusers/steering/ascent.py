"""Ascent of a reward by normalised steps in noise or embeddings, the best iterate of each sample kept.

    noise        x += step_size |x_0| g / |g|, then back onto the sphere |x| = |x_0|
    embeddings   z += step_size |z_0| g / |g| within the ball |z - z_0| <= radius |z_0|

for tokens and pooled embeddings each. g is the reward's gradient, whose norm differs 80-fold between prompts.
High-dimensional normal noise lies on that sphere; images of noise inside it are blurred.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from am_diffusers.steering.chain import Chain, End
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.terminal_cost import TINY
from am_diffusers.velocity import Conditioning

Optimized = Literal["noise", "embeddings"]
STEP_SIZES: dict[str, float] = {"noise": 0.05, "embeddings": 0.02}


class Steered(NamedTuple):
    """Best iterate of each of B samples.

    Attributes:
        cond: conditioning, with the embeddings that were found.
        noise: noise that was found, (B, ...).
        final: final latents, (B, ...).
        rewards: (B,).
        iterations: which iterate it is, 0 = the start, (B,).
        trace: rewards by iteration, (I, B), I at most iterations + 1.
        base: final latents of the start, (B, ...).
        stopped: why it stopped early; None = it didn't.
    """

    cond: Conditioning
    noise: Tensor
    final: Tensor
    rewards: Tensor
    iterations: Tensor
    trace: Tensor
    base: Tensor
    stopped: str | None


@dataclass(frozen=True)
class Ascent:
    """Settings of an ascent.

    Attributes:
        optimize: what is moved.
        iterations: number of steps; there is one more image than steps.
        step_size: length of a step relative to the start's norm.
        radius: radius of the ball around the embeddings, relative to their norm.
    """

    optimize: Optimized
    iterations: int
    step_size: float
    radius: float = 0.3

    def run(
        self, chain: Chain, cond: Conditioning, noise: Tensor, tell: Callable[[Tensor], None] = lambda _: None
    ) -> Steered:
        """Climb from a start; a gradient that is not finite ends it, with the best so far.

        Args:
            chain: sampler and reward.
            cond: conditioning of B samples.
            noise: starting noise, (B, ...).
            tell: gets the rewards (B,) of each iterate.

        Raises:
            NonFiniteError: if the start itself has no finite reward and gradient.
        """
        x, best, traced, stopped = Point(noise, cond.embeddings, cond.pooled), None, list[Tensor](), None
        start, base = x, noise
        for i in range(self.iterations + 1):
            here = replace(cond, embeddings=x.embeddings, pooled=x.pooled)
            try:
                last = i == self.iterations
                end = chain.end(here, x.noise) if last else chain.differentiated(here, x.noise)
            except NonFiniteError as error:
                if best is None:
                    raise
                stopped = f"stopped at iteration {i}: {error}"
                break
            traced.append(end.rewards)
            tell(end.rewards)
            best = _Best(x, end, torch.zeros(len(noise))) if best is None else best.updated(x, end, i)
            base = end.final if i == 0 else base
            x = self._step(x, start, end)
        assert best is not None
        found = replace(cond, embeddings=best.point.embeddings, pooled=best.point.pooled)
        return Steered(
            found,
            best.point.noise,
            best.end.final,
            best.end.rewards,
            best.iterations,
            torch.stack(traced),
            base,
            stopped,
        )

    def _step(self, x: "Point", start: "Point", end: End) -> "Point":
        gradients = end.gradients
        if gradients is None:
            return x
        if self.optimize == "noise":
            moved = x.noise - self.step_size * _along(gradients.latents, start.noise)
            return x._replace(noise=onto_sphere(moved, start.noise))

        def moved_by(slope: Tensor | None, value: Tensor | None, first: Tensor | None) -> Tensor | None:
            if value is None or first is None or slope is None:
                return value
            return into_ball(value.to(slope) - self.step_size * _along(slope, first), first, self.radius)

        return x._replace(
            embeddings=moved_by(gradients.embeddings, x.embeddings, start.embeddings),
            pooled=moved_by(gradients.pooled, x.pooled, start.pooled),
        )


class Point(NamedTuple):
    """Start of a sampler: noise (B, ...), token and pooled embeddings (B, ...) or None."""

    noise: Tensor
    embeddings: Tensor | None
    pooled: Tensor | None


class _Best(NamedTuple):
    point: Point
    end: End
    iterations: Tensor

    def updated(self, x: Point, end: End, iteration: int) -> "_Best":
        """Return the better of the two, sample by sample."""
        better = end.rewards > self.end.rewards

        def pick(new: Tensor | None, old: Tensor | None) -> Tensor | None:
            return None if new is None or old is None else torch.where(_rows(better, new), new, old.to(new))

        noise = torch.where(_rows(better, x.noise), x.noise, self.point.noise)
        point = Point(noise, *map(pick, x[1:], self.point[1:]))
        final = torch.where(_rows(better, end.final), end.final, self.end.final)
        rewards = torch.where(better, end.rewards, self.end.rewards)
        iterations = torch.where(better.cpu(), float(iteration), self.iterations)
        return _Best(point, End(final, rewards), iterations)


def onto_sphere(x: Tensor, start: Tensor) -> Tensor:
    """Return `x` (B, ...) scaled to the norm of `start`, sample by sample."""
    return x * (_norms(start) / _norms(x).clamp(min=TINY))


def into_ball(z: Tensor, start: Tensor, radius: float) -> Tensor:
    """Return `z` (B, ...), or the point of the ball |z - start| <= radius |start| nearest to it."""
    offset = z - start.to(z)
    return start.to(z) + offset * (radius * _norms(start.to(z)) / _norms(offset).clamp(min=TINY)).clamp(max=1)


def _along(gradient: Tensor, start: Tensor) -> Tensor:
    """Return the gradient with the norm of `start`; 0 if it vanishes."""
    return gradient * (_norms(start.to(gradient)) / _norms(gradient).clamp(min=TINY))


def _norms(x: Tensor) -> Tensor:
    norms = x.flatten(1).norm(dim=1)
    return _rows(norms, x)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
