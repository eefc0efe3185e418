"""The law that a velocity field samples: on a line by quadrature, in the plane by many samples.

On a line nothing is drawn. The ODE carries the quantiles of the noise along; a step of the SDE turns the
weights of a grid's points into the density of a mixture of Gaussians, one for each point,

    density(x') = sum_i weight_i N(x'; x_coef * x_i + v_coef * velocity(x_i), std^2),

taken at the grid's points again. In the plane the same is done with `NUM_SAMPLES` independent samples, and
distances have a floor: the distance of two such sets from one law.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers.noise import generator_for
from am_diffusers.rollout import noise_level, sample, sample_ode
from am_diffusers.transitions import Transitions, memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import Conditioning, VelocityField
from benching.oracles.measures import Points
from benching.oracles.mixture import Mixture

Sampler = Literal["sde", "ode"]
SDE_STEPS, ODE_STEPS = 64, 64
NUM_QUANTILES, NUM_SAMPLES = 4000, 20_000
GRID = torch.linspace(-5, 5, 801, dtype=torch.float64)
FINE = torch.linspace(-5, 5, 20_001, dtype=torch.float64)


def describe() -> dict[str, Any]:
    """Return everything that a measured law depends on beside the field, for JSON."""
    return {
        "sde": f"memoryless_local_linear, uniform, {SDE_STEPS} steps",
        "ode": f"second order, uniform, {ODE_STEPS} steps",
        "on_a_line": [NUM_QUANTILES, len(GRID), len(FINE), GRID[-1].item()],
        "samples_in_the_plane": NUM_SAMPLES,
    }


def law_of(field: VelocityField, dim: int, sampler: Sampler, seed: int) -> Points:
    """Return the end points of a field.

    Args:
        field: field to follow.
        dim: 1 or 2 dimensions.
        sampler: the memoryless SDE, or the ODE in steps of second order; both in many steps.
        seed: seed of the noise in the plane; on a line there is none.

    Raises:
        ValueError: if an end point isn't finite.
    """
    generator = generator_for("law", sampler, seed)
    table = memoryless_local_linear(uniform_sigmas(SDE_STEPS))

    def noise(_: int = 0) -> Tensor:
        return torch.randn(NUM_SAMPLES, dim, generator=generator, dtype=torch.float64)

    if sampler == "ode":
        start = quantiles_of_noise() if dim == 1 else noise()
        return Points.equal(sample_ode(field, uniform_sigmas(ODE_STEPS), conditioning(len(start)), start))
    if dim == 1:
        return sde_on_a_line(field, table)
    return Points.equal(sample(field, table, conditioning(NUM_SAMPLES), noise(), noise))


def points_of(law: Mixture, seed: int) -> Points:
    """Return a mixture as points: on a line a fine grid weighed by the density, in the plane samples."""
    if law.means.shape[1] > 1:
        return Points.equal(law.sample(NUM_SAMPLES, generator_for("points", seed)))
    return Points(FINE[:, None], law.log_density(FINE[:, None], 0.0).softmax(0))


def conditioning(num: int) -> Conditioning:
    """Return the conditioning of `num` samples of one prompt, which the fields here ignore."""
    return Conditioning(("",) * num)


def quantiles_of_noise() -> Tensor:
    """Return the quantiles of N(0, 1) in the middle of equal shares, (NUM_QUANTILES, 1)."""
    levels = (torch.arange(NUM_QUANTILES, dtype=torch.float64) + 0.5) / NUM_QUANTILES
    return math.sqrt(2) * torch.erfinv(2 * levels - 1)[:, None]


@torch.no_grad()
def sde_on_a_line(field: VelocityField, table: Transitions) -> Points:
    """Return the end points of a table whose steps all add noise but the last; means stay in the grid."""
    x, cond = GRID[:, None], conditioning(len(GRID))
    weight, end = (-0.5 * GRID**2).softmax(0), x
    for k in range(table.num_steps):
        end = table.mean(k, x, field(x, noise_level(table, k, x), cond))
        std = table.std[k].item()
        if std > 0:
            mean = end[:, 0].clamp(GRID[0], GRID[-1])
            kernel = (-0.5 * ((GRID[:, None] - mean) / std) ** 2).softmax(0)
            weight = kernel @ weight
    return Points(end, weight / weight.sum())
