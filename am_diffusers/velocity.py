"""A network as the mathematics sees it: a velocity, its vector-Jacobian product, and what a velocity says.

    x = (1 - sigma) * clean + sigma * noise        velocity = noise - clean
    clean = x - sigma * velocity                   noise = x + (1 - sigma) * velocity
    score = -noise / sigma                         eta = sigma / (1 - sigma)

sigma goes from 1 (noise) to 0 (data), as in Diffusers. As predictions of a model clean, noise and score are
conditional means given x. `sigma` is a float or a tensor (B,).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

Pull = Callable[[Tensor], Tensor]
"""Pulls a cotangent of the velocity back to the state: c -> J(x)^T c. To be called once: it frees the
graph."""


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a velocity field, one row per sample.

    Attributes:
        prompts: the B prompts the rows were made from.
        embeddings: token embeddings, (B, tokens, dim), or None for an unconditional field.
        pooled: pooled embeddings, (B, dim), or None.
        mask: which tokens are part of the prompt, (B, tokens), or None = all.
        negative_embeddings: embeddings of the negative prompt, (B, tokens, dim); None without guidance.
        negative_pooled: pooled embeddings of the negative prompt, (B, dim); None without guidance.
        negative_mask: mask of the negative prompt, (B, tokens), or None.

    Raises:
        ValueError: if a tensor's first dimension is not the number of prompts.
    """

    prompts: tuple[str, ...]
    embeddings: Tensor | None = None
    pooled: Tensor | None = None
    mask: Tensor | None = None
    negative_embeddings: Tensor | None = None
    negative_pooled: Tensor | None = None
    negative_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._tensors().items():
            if value.shape[0] != len(self.prompts):
                raise ValueError(
                    f"Conditioning.{name}: {value.shape[0]} rows for {len(self.prompts)} prompts"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def index(self, rows: Sequence[int]) -> "Conditioning":
        """Rows `rows` (with repetition allowed) as a Conditioning of their own."""
        picked = {name: value[list(rows)] for name, value in self._tensors().items()}
        return replace(self, prompts=tuple(self.prompts[i] for i in rows), **picked)

    def negative(self) -> "Conditioning":
        """Return the same rows conditioned on the negative prompt, for classifier-free guidance.

        Raises:
            ValueError: if no negative embeddings were encoded.
        """
        if self.negative_embeddings is None:
            raise ValueError("guidance needs negative embeddings: encode the prompts with `negative_prompt`")
        return replace(
            self,
            embeddings=self.negative_embeddings,
            pooled=self.negative_pooled,
            mask=self.negative_mask,
        )


class VelocityField(Protocol):
    """A velocity model as the mathematics sees it."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity at `x` (B, ...) and noise levels `sigma` (B,) in [0, 1]; same shape as `x`."""
        ...

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return the velocity, detached, and the function that pulls a cotangent of it back to `x`.

        Between the two there is time for what needs the velocity: the deterministic last step of a rollout is
        rewarded before its adjoint is known.
        """
        ...


@dataclass(frozen=True)
class CallableField:
    """Any differentiable function `(x, sigma, cond) -> velocity` as a VelocityField."""

    function: Callable[[Tensor, Tensor, Conditioning], Tensor]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity at `x`, differentiable in whatever `function` is differentiable in."""
        return self.function(x, sigma, cond)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return velocity and pull-back by autograd, see `VelocityField.vjp`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            velocity = self.function(x, sigma, cond)

        def pull(cotangent: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(velocity, x, cotangent, allow_unused=True)
            return torch.zeros_like(x) if gradient is None else gradient

        return velocity.detach(), pull


@dataclass(frozen=True)
class GuidedField:
    """Classifier-free guidance `v_neg + guidance_scale * (v - v_neg)` around a field (1.0 = off).

    Used for rollouts and evaluation; in training the policy and the base are unguided by default.
    """

    field: VelocityField
    guidance_scale: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Guided velocity at `x`: two calls of the field."""
        negative = self.field(x, sigma, cond.negative())
        return negative + self.guidance_scale * (self.field(x, sigma, cond) - negative)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return the guided velocity and its pull-back through both branches: three passes of the field."""
        negative = self.field(x, sigma, cond.negative()).detach()
        velocity, pull_positive = self.field.vjp(x, sigma, cond)
        scale = self.guidance_scale

        def pull(cotangent: Tensor) -> Tensor:
            positive = pull_positive(scale * cotangent)  # its graph is gone before the next one is made
            _, pull_negative = self.field.vjp(x, sigma, cond.negative())
            return positive + pull_negative((1 - scale) * cotangent)

        return negative + scale * (velocity - negative), pull


Sigma = float | Tensor


def _like(sigma: Sigma, x: Tensor) -> Tensor:
    """`sigma` shaped to broadcast against `x` (B, ...)."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def interpolate(clean: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """Noisy state (1 - sigma) * clean + sigma * noise, (B, ...)."""
    sigma = _like(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def clean_from_velocity(x: Tensor, sigma: Sigma, velocity: Tensor) -> Tensor:
    """Clean estimate x - sigma * velocity, (B, ...)."""
    return x - _like(sigma, x) * velocity


def noise_from_velocity(x: Tensor, sigma: Sigma, velocity: Tensor) -> Tensor:
    """Noise estimate x + (1 - sigma) * velocity, (B, ...)."""
    return x + (1 - _like(sigma, x)) * velocity


def score_from_velocity(x: Tensor, sigma: Sigma, velocity: Tensor) -> Tensor:
    """Score of the noisy law at `x`, -noise / sigma, (B, ...); sigma > 0."""
    return -noise_from_velocity(x, sigma, velocity) / _like(sigma, x)


def velocity_from_clean(x: Tensor, sigma: Sigma, clean: Tensor) -> Tensor:
    """Velocity (x - clean) / sigma of a clean estimate, (B, ...); sigma > 0."""
    return (x - clean) / _like(sigma, x)


def velocity_from_noise(x: Tensor, sigma: Sigma, noise: Tensor) -> Tensor:
    """Velocity (noise - x) / (1 - sigma) of a noise estimate, (B, ...); sigma < 1."""
    return (noise - x) / (1 - _like(sigma, x))


def velocity_from_score(x: Tensor, sigma: Sigma, score: Tensor) -> Tensor:
    """Velocity of the score of the noisy law, (B, ...); sigma < 1."""
    return velocity_from_noise(x, sigma, -_like(sigma, x) * score)


def memoryless_eta(sigma: float) -> float:
    """Ratio eta = sigma / (1 - sigma); the memoryless diffusion is sqrt(2 eta) (arXiv 2409.08861)."""
    return sigma / (1 - sigma)
