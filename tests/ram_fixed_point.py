"""Velocities that RAM converges to on 1-D Gaussian data, in closed form.

The policy is affine in x at each of many noise levels: velocity = a x + b. Its end points by the ODE are then
Gaussian, N(m, V), and with x = (1 - sigma) * clean + sigma * noise so is everything else. The reward is
slope * clean - curvature / 2 * (clean - best)^2. RAM's target given x has the mean

    velocity_base(x) + reward_scale * [Cov(r, u | x) + (E[r | x] - E[r]) * (E[u | x] - a x - b)]

with u = noise - clean, and the regression of an affine policy is its projection, taken with Gauss-Hermite
nodes that are exact here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIGMAS: Array = np.linspace(1, 0, 1001)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(8)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True)
class Gaussian:
    """Clean data N(mean, variance)."""

    mean: float
    variance: float

    def posterior(self, sigma: Array) -> tuple[Array, Array, Array]:
        """Gain g and offset h of the mean g x + h of clean given x at each sigma, and its variance."""
        t = 1 - sigma
        total = t**2 * self.variance + sigma**2
        gain, variance = t * self.variance / total, self.variance * sigma**2 / total
        return gain, self.mean * sigma**2 / total, variance

    def velocity(self, sigma: Array) -> Array:
        """Slopes and intercepts of the velocity E[noise - clean | x], (2, number of sigmas)."""
        t = 1 - sigma
        total = t**2 * self.variance + sigma**2
        return np.stack([(sigma - t * self.variance) / total, -self.mean * sigma / total])


@dataclass(frozen=True)
class Quadratic:
    """The reward slope * clean - curvature / 2 * (clean - best)^2."""

    slope: float = 0.0
    curvature: float = 0.0
    best: float = 0.0

    def tilted(self, law: Gaussian, scale: float) -> Gaussian:
        """The law times exp(scale * reward)."""
        precision = 1 / law.variance + scale * self.curvature
        force = law.mean / law.variance + scale * (self.slope + self.curvature * self.best)
        return Gaussian(force / precision, 1 / precision)


def end_points(policy: Array) -> Gaussian:
    """Law of the ODE's end points for slopes and intercepts (2, 1001) at SIGMAS, by the trapezoid rule."""
    slope, intercept = policy
    steps = np.diff(SIGMAS)
    areas = np.append(steps * (slope[1:] + slope[:-1]) / 2, 0.0)
    gain = np.exp(areas[::-1].cumsum()[::-1])  # from each sigma to 0
    pushed = gain * intercept
    return Gaussian(float(steps @ (pushed[1:] + pushed[:-1]) / 2), float(gain[0] ** 2))


def euler_end_points(policy: Array) -> Gaussian:
    """The same by 40 Euler steps, which make pictures with 6 % too little variance of N(0, 1)."""
    mean, gain, step = 0.0, 1.0, -1 / 40
    for slope, intercept in policy[:, :-1:25].T.tolist():
        mean, gain = mean + step * (slope * mean + intercept), gain * (1 + step * slope)
    return Gaussian(mean, gain**2)


def mean_target(
    x: Array, sigma: Array, *, base: Array, policy: Array, law: Gaussian, reward: Quadratic, scale: float
) -> Array:
    """Mean of RAM's target at `x` (n, S) and `sigma` (S,), for end points of `law`.

    `base` and `policy` are slopes and intercepts, (2, S) each.
    """
    gain, offset, variance = law.posterior(sigma)
    clean = gain * x + offset
    pull = reward.slope - reward.curvature * (clean - reward.best)
    velocity = law.velocity(sigma)
    # Of r with u = (x - clean) / sigma; the posterior variance is of the order sigma^2.
    covariance = -pull * law.variance * sigma / ((1 - sigma) ** 2 * law.variance + sigma**2)
    distance = clean - reward.best
    expected = reward.slope * clean - reward.curvature / 2 * (distance**2 + variance)
    apart = law.mean - reward.best
    average = reward.slope * law.mean - reward.curvature / 2 * (apart**2 + law.variance)
    mismatch = (velocity - policy)[0] * x + (velocity - policy)[1]
    return base[0] * x + base[1] + scale * (covariance + (expected - average) * mismatch)


def regressed(
    policy: Array, law: Gaussian, reward: Quadratic, scale: float, sampler: Callable[[Array], Gaussian]
) -> Array:
    """The affine policy that RAM's regression makes of an affine one, (2, 1001) at SIGMAS."""
    ends, sigma = sampler(policy), SIGMAS
    std = np.sqrt((1 - sigma) ** 2 * ends.variance + sigma**2)
    x, base = (1 - sigma) * ends.mean + std * NODES[:, None], law.velocity(sigma)
    target = mean_target(x, sigma, base=base, policy=policy, law=ends, reward=reward, scale=scale)
    slope = WEIGHTS @ (target * NODES[:, None]) / std
    return np.stack([slope, WEIGHTS @ target - slope * (1 - sigma) * ends.mean])


def fixed_point(
    law: Gaussian, reward: Quadratic, scale: float, sampler: Callable[[Array], Gaussian] = end_points
) -> Array:
    """Slopes and intercepts (2, 1001) at SIGMAS that RAM's regression leaves as they are."""
    policy = law.velocity(SIGMAS)
    for _ in range(60):
        policy = policy + 0.5 * (regressed(policy, law, reward, scale, sampler) - policy)
    return policy


def distance(policy: Array, law: Gaussian) -> float:
    """RMS error of a policy against the velocity of `law`, over its marginals at sigma = .1 .. .9."""
    at = slice(100, 901, 100)
    sigma = SIGMAS[at]
    difference = policy[:, at] - law.velocity(sigma)
    std = np.sqrt((1 - sigma) ** 2 * law.variance + sigma**2)
    x = (1 - sigma) * law.mean + std * NODES[:, None]
    return float(np.sqrt((WEIGHTS @ (difference[0] * x + difference[1]) ** 2).mean()))
