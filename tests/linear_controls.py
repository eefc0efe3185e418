"""Schroedinger bridges of Gaussians on a line, solved by controls and correctors that are affine in x."""

from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.reciprocal import brownian, corrector_rows, noise_levels, reciprocal_rows, steer
from am_diffusers.velocity import CallableField, Conditioning


def least_squares(x: Tensor, target: Tensor) -> Tensor:
    """Slope and intercept of the regression of (N, 1) on (N, 1)."""
    centred = x - x.mean()
    slope = (centred * target).sum() / centred.square().sum()
    return torch.stack([slope, target.mean() - slope * x.mean()])


class Ends(NamedTuple):
    source: Tensor
    end: Tensor
    log_ratio: Tensor


class Moments(NamedTuple):
    """Of the end, and its covariance with the source; the corrector's slope and intercept that follow."""

    mean: float
    variance: float
    covariance: float
    corrector: tuple[float, float]


class LinearBridge:
    """Alternates sweeps of the control and fits of the corrector, all through the product's rows.

    Args:
        source: mean and standard deviation of the source; deviation 0 is a point.
        target: mean and variance of the end.
        nu: strength of the reference.
        damping: share of each new fit in the control.
        sign: 1; -1 turns the adjoint round, to be seen failing.
    """

    def __init__(self, source, target, nu, *, damping=0.5, sign=1.0, num=5000, num_steps=120):
        self.source, self.target, self.nu = source, target, nu
        self.damping, self.sign, self.num = damping, sign, num
        self.table = brownian(noise_levels(num_steps, 0.03), nu)
        self.coefficients = torch.zeros(num_steps, 2, dtype=torch.float64)
        self.corrector = torch.zeros(2, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        self.levels = self.table.sigmas[:-1]
        self.cond = Conditioning(("",) * num)

    def normal(self, _=0):
        """Standard normal numbers whose mean and variance are exact: less noise in the moments."""
        noise = torch.randn(self.num, 1, generator=self.generator).double()
        return (noise - noise.mean()) / noise.std()

    def control(self, x, level, cond):
        slope, intercept = self.coefficients[(self.levels - level[0]).abs().argmin()]
        return slope * x + intercept

    def run(self) -> Ends:
        source = self.source[0] + self.source[1] * self.normal()
        steered = steer(CallableField(self.control), self.table, self.cond, source, self.normal)
        return Ends(source, steered.end, steered.log_ratio)

    def moments(self) -> Moments:
        """Return what the control leads to, exactly: it is affine."""
        mean, deviation = self.source
        variance = covariance = deviation**2
        for d, (slope, intercept) in zip(self.table.v_coef.tolist(), self.coefficients.tolist(), strict=True):
            factor = 1 + d * slope
            mean, covariance = factor * mean + d * intercept, factor * covariance
            variance = factor**2 * variance + d
        share = covariance / variance  # the source's regression on the end
        corrector = ((share - 1) / self.nu**2, (self.source[0] - share * mean) / self.nu**2)
        return Moments(mean, variance, covariance, corrector)

    def sweep(self) -> None:
        ends = self.run()
        mean, variance = self.target
        h = self.corrector[0] * ends.end + self.corrector[1]
        adjoint = self.sign * ((ends.end - mean) / variance + h)
        for k, level in enumerate(self.levels):
            levels = level.expand(self.num)
            rows = reciprocal_rows(ends.source, ends.end, adjoint, levels, self.nu, self.normal(), self.cond)
            fresh = least_squares(rows.latents, rows.target)
            if rows.latents.var() < 1e-20:  # at the source's point only the mean is known
                fresh = torch.stack([torch.zeros(()).double(), rows.target.mean()])
            self.coefficients[k] += self.damping * (fresh - self.coefficients[k])

    def correct(self, runs: int = 3) -> None:
        fits = []
        for _ in range(runs):
            ends = self.run()
            rows = corrector_rows(ends.source, ends.end, self.nu, self.cond)
            fits.append(least_squares(rows.latents, rows.target))
        self.corrector = torch.stack(fits).mean(0)
