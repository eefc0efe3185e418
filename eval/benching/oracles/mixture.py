"""Mixtures of Gaussians as data laws: their velocities and tilts are known in closed form.

In the sigma convention, with t = 1 - sigma, the noisy law of component i is N(t m_i, d_i I) with
d_i = t^2 V_i + sigma^2, and its velocity E[noise - clean | x] is linear in x. The mixture's velocity is the
mean over the components that x may come from.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from am_diffusers.velocity import CallableField


@dataclass(frozen=True)
class Mixture:
    """Data law sum_i weights[i] N(means[i], variances[i] I) in D dimensions, float64.

    Attributes:
        weights: weights of the components, (M,), adding up to 1.
        means: means of the components, (M, D).
        variances: variances of the components in each dimension, (M,).
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def _parts(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return t (B, 1), d (B, M), x - t m (B, M, D) and log w_i N(x; t m_i, d_i) (B, M)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))[:, None]
        t = 1 - sigma
        d = t**2 * self.variances + sigma**2
        z = x[:, None] - t[:, :, None] * self.means
        dim = x.shape[1]
        log_density = -0.5 * z.square().sum(2) / d - 0.5 * dim * (2 * math.pi * d).log()
        return t, d, z, self.weights.log() + log_density

    def log_density(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Log density of the law at noise level sigma in [0, 1] at `x` (B, D), (B,)."""
        return self._parts(x, sigma)[3].logsumexp(1)

    def velocity(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return E[noise - clean | x] at `x` (B, D), for sigma in [0, 1], (B, D)."""
        t, d, z, logits = self._parts(x, sigma)
        slope = (1 - t - t * self.variances) / d
        each = slope[:, :, None] * z - self.means
        return (logits.softmax(1)[:, :, None] * each).sum(1)

    def field(self) -> CallableField:
        """Return the velocity as a field without conditioning."""
        return CallableField(lambda x, sigma, cond: self.velocity(x, sigma))

    def tilted(self, slope: Tensor, curvature: float = 0.0) -> "Mixture":
        """Return the law times exp(slope . x - curvature |x|^2 / 2), normalised: again a mixture."""
        precision = 1 / self.variances + curvature
        means = (self.means / self.variances[:, None] + slope) / precision[:, None]
        exponent = means.square().sum(1) * precision - self.means.square().sum(1) / self.variances
        dim = self.means.shape[1]
        logits = self.weights.log() + 0.5 * exponent - 0.5 * dim * (precision * self.variances).log()
        return replace(self, weights=logits.softmax(0), means=means, variances=1 / precision)

    def mean(self) -> Tensor:
        """Return the mean of the data law, (D,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Return the covariance of the data law, (D, D)."""
        centred = self.means - self.mean()
        within = (self.weights @ self.variances) * torch.eye(self.means.shape[1], dtype=torch.float64)
        return within + centred.T @ (self.weights[:, None] * centred)

    def posterior(self, x: Tensor) -> Tensor:
        """Return the probability that the clean points `x` (B, D) come from each component, (B, M)."""
        return self._parts(x, 0.0)[3].softmax(1)

    def mode_weights(self, x: Tensor) -> Tensor:
        """Return the share of the points `x` (B, D) in each component, by posterior probability, (M,)."""
        return self.posterior(x).mean(0)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Return independent points of the data law, (num, D)."""
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + self.variances[component].sqrt()[:, None] * noise
