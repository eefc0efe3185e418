"""Annealed sampling of a Gaussian on a line, by affine controls, through the paths of the sampler."""

import torch

from am_diffusers.noise import generator_for
from am_diffusers.reciprocal import brownian, noise_levels, reciprocal_rows, steer
from am_diffusers.samplers.energies.gaussian import Gaussian
from am_diffusers.samplers.naas import Annealing
from am_diffusers.samplers.parts.gradients import Gradients
from am_diffusers.samplers.parts.networks import rows_of
from am_diffusers.velocity import CallableField
from linear_controls import least_squares

PRECISION, PRIOR = 4.0, 1.0  # of the target, of the prior; diffusion 1


class LinearAnnealing:
    """Sweeps of control and source stage from N(0, 1) to N(0, 1/4).

    Args:
        sign: 1; -1 turns the adjoint round, to be seen failing.
        staged: whether the source stage learns.
    """

    def __init__(self, *, sign=1.0, staged=True, num=3000, num_steps=160):
        self.sign, self.staged, self.num, self.num_steps = sign, staged, num, num_steps
        energy = Gaussian(1, 0.0, 1 / PRECISION)
        self.annealing = Annealing(Gradients(energy), PRIOR, num_steps, 1.0)
        self.table = brownian(noise_levels(160, 0.05), PRIOR)
        self.control = torch.zeros(num_steps, 2, dtype=torch.float64)
        self.stage = torch.zeros(self.table.num_steps, 2, dtype=torch.float64)
        self.generator = generator_for("linear annealing")
        self.value = 0.0  # slope of the adjoint at the source

    def normal(self, _=0):
        return torch.randn(self.num, 1, generator=self.generator).double()

    def controlled(self, x, level, cond):
        slope, intercept = self.control[round((1 - level[0].item()) * self.num_steps)]
        return slope * x + intercept

    def staged_field(self, x, level, cond):
        slope, intercept = self.stage[(self.table.sigmas[:-1] - level[0]).abs().argmin()]
        return slope * x + intercept

    def sweep(self, damping: float) -> None:
        origin, cond = torch.zeros(self.num, 1, dtype=torch.float64), rows_of(self.num)
        source = steer(CallableField(self.staged_field), self.table, cond, origin, self.normal).end
        states, adjoints, _ = self.annealing.paths(CallableField(self.controlled), source, self.generator)
        for k in range(self.num_steps):
            fresh = least_squares(states[k], -self.sign * adjoints[k + 1])
            self.control[k] += damping * (fresh - self.control[k])
        self.value += damping * (least_squares(source, adjoints[0])[0].item() - self.value)
        for k, level in enumerate(self.table.sigmas[:-1]) if self.staged else ():
            levels, sign = level.expand(self.num), self.sign
            rows = reciprocal_rows(origin, source, sign * adjoints[0], levels, PRIOR, self.normal(), cond)
            fresh = least_squares(rows.latents, rows.target) if k else torch.zeros(2).double()
            self.stage[k] += damping * (fresh - self.stage[k])

    def variances(self) -> tuple[float, float]:
        """Variances of source and end, exactly, by the slopes."""
        source = 0.0
        for k, slope in enumerate(self.stage[:, 0].tolist()):
            d = self.table.v_coef[k].item()
            source = (1 + d * slope) ** 2 * source + d
        end, h = source, 1 / self.num_steps
        for k, slope in enumerate(self.control[:, 0].tolist()):
            share = k * h
            precision = (1 - share) / PRIOR**2 + share * PRECISION
            end = (1 + h * (slope - precision / 2)) ** 2 * end + h
        return source, end
