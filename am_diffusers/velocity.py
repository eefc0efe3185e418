"""A network as the mathematics sees it: a velocity and its vector-Jacobian products; its conditioning.

velocity = noise - clean at x = (1 - sigma) * clean + sigma * noise, sigma from 1 (noise) to 0 (data) as in
Diffusers; `parametrization.py` says what else a velocity tells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

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


class InputGradients(NamedTuple):
    """Gradients with respect to what a velocity is computed from.

    Attributes:
        latents: with respect to the state, (B, ...).
        embeddings: with respect to `Conditioning.embeddings`, (B, tokens, dim); None where there are none.
        pooled: with respect to `Conditioning.pooled`, (B, dim), or None.
        parameters: with respect to parameters, summed over the batch.
    """

    latents: Tensor
    embeddings: Tensor | None = None
    pooled: Tensor | None = None
    parameters: tuple[Tensor, ...] = ()


class DifferentiableField(VelocityField, Protocol):
    """A velocity model that can be differentiated in its conditioning and parameters, too."""

    def input_vjp(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        cotangent: Tensor,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, InputGradients]:
        """Return the velocity and a cotangent of it pulled back to all inputs, detached: one backward pass.

        Args:
            x: states, (B, ...); gradients have their dtype.
            sigma: noise levels, (B,).
            cond: conditioning, B rows; nothing is pulled back to what it lacks, nor to the negative prompt.
            cotangent: (B, ...).
            parameters: leaves of the field; their gradients are returned and not added to `.grad`.
        """
        ...


def pull_back_inputs(
    velocity: Callable[[Tensor, Conditioning], Tensor],
    x: Tensor,
    cond: Conditioning,
    pull: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
) -> tuple[Tensor, InputGradients]:
    """Compute a velocity of leaves in the dtype of `x`, and pull back: `DifferentiableField.input_vjp`.

    Args:
        velocity: function of state and conditioning.
        x: states, (B, ...).
        cond: conditioning, B rows.
        pull: velocity and leaves (B, ...) to gradients of the leaves, then those of the parameters.
    """
    rows = {"x": x, "embeddings": cond.embeddings, "pooled": cond.pooled}
    with torch.enable_grad():
        leaves = {
            name: row.detach().to(x.dtype).requires_grad_(True)
            for name, row in rows.items()
            if row is not None
        }
        given = {name: leaf for name, leaf in leaves.items() if name != "x"}
        output = velocity(leaves["x"], replace(cond, **given))
    gradients = pull(output, list(leaves.values()))
    named = dict(zip(leaves, gradients, strict=False))
    return output.detach(), InputGradients(
        named["x"], named.get("embeddings"), named.get("pooled"), tuple(gradients[len(leaves) :])
    )


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

    def input_vjp(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        cotangent: Tensor,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, InputGradients]:
        """Return velocity and gradients by autograd, see `DifferentiableField.input_vjp`."""

        def pull(velocity: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
            inputs = [*leaves, *parameters]
            return torch.autograd.grad(velocity, inputs, cotangent, materialize_grads=True)

        return pull_back_inputs(lambda x, cond: self.function(x, sigma, cond), x, cond, pull)


Field = TypeVar("Field", bound=VelocityField, covariant=True)


@dataclass(frozen=True)
class GuidedField(Generic[Field]):
    """Classifier-free guidance `v_neg + guidance_scale * (v - v_neg)` around a field (1.0 = off).

    Used for rollouts and evaluation; in training the policy and the base are unguided by default.
    """

    field: Field
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

    def input_vjp(
        self: "GuidedField[DifferentiableField]",
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        cotangent: Tensor,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, InputGradients]:
        """Return velocity and gradients, of embeddings through the conditional branch only: two passes.

        State and parameters are in both branches; the negative prompt is not an input.
        """
        scale, unconditional = self.guidance_scale, cond.negative()
        negative, below = self.field.input_vjp(x, sigma, unconditional, (1 - scale) * cotangent, parameters)
        velocity, above = self.field.input_vjp(x, sigma, cond, scale * cotangent, parameters)
        both = tuple(a + b for a, b in zip(above.parameters, below.parameters, strict=True))
        gradients = above._replace(latents=above.latents + below.latents, parameters=both)
        return negative + scale * (velocity - negative), gradients
