"""Closed forms to test against: data laws whose velocity is known, their tilts, and linear chains."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, DifferentiableField, InputGradients, Pull, VelocityField
from benching.oracles.mixture import Mixture


def unconditional(num: int) -> Conditioning:
    return Conditioning(tuple(f"prompt {i}" for i in range(num)))


def float64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gaussian(mean: float, variance: float, dim: int = 1) -> Mixture:
    return Mixture(float64(1.0), float64(mean).expand(1, dim), float64(variance))


THREE_MODES = Mixture(
    float64(0.5, 0.3, 0.2),
    torch.tensor([[-0.9, 0.2], [0.9, 0.6], [0.3, -0.9]], dtype=torch.float64),
    float64(0.20, 0.15, 0.25),
)


def affine(field: VelocityField, sigma: float) -> tuple[float, float]:
    """Slope and intercept in x of a one-dimensional field that is affine in x."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    with torch.no_grad():
        at_0, at_1 = field(x, x.new_full((2,), sigma), unconditional(2))[:, 0].tolist()
    return at_1 - at_0, at_0


def chain_moments(table: Transitions, law: Mixture) -> tuple[float, float]:
    """Factor of x_0 in x_K and variance of x_K given x_0, for 1-D Gaussian data and the base."""
    gain, variance = 1.0, 0.0
    for k in range(table.num_steps):
        slope, _ = affine(law.field(), table.sigmas[k].item())
        factor = (table.x_coef[k] + table.v_coef[k] * slope).item()
        gain, variance = factor * gain, factor**2 * variance + table.std[k].item() ** 2
    return gain, variance


@dataclass
class CountingField:
    """A field that counts how often, and at which sigmas, it is called or differentiated."""

    field: DifferentiableField

    def __post_init__(self) -> None:
        self.calls: list[float] = []
        self.vjps: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append(sigma[0].item())
        return self.field(x, sigma, cond)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        self.vjps.append(sigma[0].item())
        return self.field.vjp(x, sigma, cond)

    def input_vjp(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        cotangent: Tensor,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, InputGradients]:
        self.vjps.append(sigma[0].item())
        return self.field.input_vjp(x, sigma, cond, cotangent, parameters)
