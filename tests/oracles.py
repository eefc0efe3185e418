"""Closed forms to test against: data laws whose velocity is known, their tilts, and linear chains."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from am_diffusers.transitions import Transitions
from am_diffusers.velocity import CallableField, Conditioning, Cotangent, VelocityField


def unconditional(num: int) -> Conditioning:
    return Conditioning(tuple(f"prompt {i}" for i in range(num)))


def float64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """Data law sum_i weights[i] N(means[i], variances[i] I) in D dimensions, float64.

    In the sigma convention the noisy law of component i is N(t m_i, d_i), t = 1 - sigma,
    d_i = t^2 V_i + sigma^2, and velocity = E[noise - clean | x] is linear in x for each component.
    """

    weights: Tensor  # (M,)
    means: Tensor  # (M, D)
    variances: Tensor  # (M,)

    def _parts(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors t (B, 1), d (B, M), x - t m (B, M, D) and log w_i N(x; t m_i, d_i) (B, M)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))[:, None]
        t = 1 - sigma
        d = t**2 * self.variances + sigma**2
        z = x[:, None] - t[:, :, None] * self.means
        dim = x.shape[1]
        log_density = -0.5 * z.square().sum(2) / d - 0.5 * dim * (2 * math.pi * d).log()
        return t, d, z, self.weights.log() + log_density

    def log_density(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Log density of the law at noise level sigma, (B,)."""
        return self._parts(x, sigma)[3].logsumexp(1)

    def velocity(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[noise - clean | x] at `x` (B, D), for sigma in [0, 1]."""
        t, d, z, logits = self._parts(x, sigma)
        slope = (1 - t - t * self.variances) / d
        each = slope[:, :, None] * z - self.means
        return (logits.softmax(1)[:, :, None] * each).sum(1)

    def field(self) -> CallableField:
        return CallableField(lambda x, sigma, cond: self.velocity(x, sigma))

    def tilted(self, slope: Tensor, curvature: float = 0.0) -> "Mixture":
        """The law times exp(slope . x - curvature |x|^2 / 2), normalised: again a mixture."""
        precision = 1 / self.variances + curvature
        means = (self.means / self.variances[:, None] + slope) / precision[:, None]
        exponent = means.square().sum(1) * precision - self.means.square().sum(1) / self.variances
        dim = self.means.shape[1]
        logits = self.weights.log() + 0.5 * exponent - 0.5 * dim * (precision * self.variances).log()
        return replace(self, weights=logits.softmax(0), means=means, variances=1 / precision)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centred = self.means - self.mean()
        within = (self.weights @ self.variances) * torch.eye(self.means.shape[1], dtype=torch.float64)
        return within + centred.T @ (self.weights[:, None] * centred)

    def mode_weights(self, x: Tensor) -> Tensor:
        """Share of the points `x` (B, D) in each component, by posterior probability, (M,)."""
        return self._parts(x, 0.0)[3].softmax(1).mean(0)


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

    field: VelocityField

    def __post_init__(self) -> None:
        self.calls: list[float] = []
        self.vjps: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append(sigma[0].item())
        return self.field(x, sigma, cond)

    def vjp(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, cotangent: Cotangent
    ) -> tuple[Tensor, Tensor]:
        self.vjps.append(sigma[0].item())
        return self.field.vjp(x, sigma, cond, cotangent)
