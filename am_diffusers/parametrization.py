"""Conversions between what a model of noisy states may predict.

    x = (1 - sigma) * clean + sigma * noise        velocity = noise - clean
    clean = x - sigma * velocity                   noise = x + (1 - sigma) * velocity
    score = -noise / sigma                         eta = sigma / (1 - sigma)

sigma goes from 1 (noise) to 0 (data), as in Diffusers. As predictions of a model clean, noise and score are
conditional means given x. `sigma` is a float or a tensor (B,).
"""

import torch
from torch import Tensor

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
