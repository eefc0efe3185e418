"""Distances of samples from the law: exact optimal transport beside its floor, mode masses, path weights.

The transport cost of n samples is the mean squared distance of the best assignment to n exact samples. Two
exact sets of n are apart as well: that is the floor, printed beside it. Published Sinkhorn costs of such
benchmarks lie below the floor, so they are not comparable with either.

A low matching loss or a high bound says nothing about the masses of modes far apart: they are measured.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from am_diffusers.samplers.base import Drawn
from am_diffusers.samplers.energies.base import Energy

ENOUGH_SHARE = 0.1
"""Least effective share of the samples for which resampling by path weights is reported."""


EXACT_SETS = 2
"""Exact sets that a transport cost is averaged over: that of one varies by a third with its mode counts."""


class PathWeights(NamedTuple):
    """Summary of log weights of paths.

    Attributes:
        elbo: the mean, a lower bound of log Z up to noise.
        log_z: log of the mean of the weights.
        effective_share: (sum w)^2 / (n sum w^2), in (0, 1]; 1 = the paths are those wanted.
    """

    elbo: float
    log_z: float
    effective_share: float


def path_weights(log_weights: Tensor) -> PathWeights:
    """Summarise log weights (B,)."""
    log_weights, number = log_weights.double(), len(log_weights)
    total = log_weights.logsumexp(0)
    share = (2 * total - (2 * log_weights).logsumexp(0)).exp() / number
    return PathWeights(log_weights.mean().item(), (total - math.log(number)).item(), share.item())


def resampled(drawn: Drawn, number: int, generator: torch.Generator) -> Tensor:
    """Draw `number` of the samples by their path weights, with replacement, (number, D)."""
    weights = (drawn.log_weights.double() - drawn.log_weights.max()).exp()
    return drawn.x[torch.multinomial(weights, number, replacement=True, generator=generator)]


def transport_cost(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the best assignment of samples (N, D) to others (N, D), exactly."""
    costs = cdist(x.double().numpy(), y.double().numpy(), "sqeuclidean")
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].mean())


def masses(energy: Energy, x: Tensor) -> Tensor | None:
    """Shares of samples (N, D) in each mode, (M,); None if the modes aren't known."""
    where = energy.modes(x)
    if where is None or energy.mode_masses is None:
        return None
    return torch.bincount(where, minlength=len(energy.mode_masses)) / len(x)


def total_variation(energy: Energy, x: Tensor) -> float | None:
    """Half the sum of absolute differences of the mode masses; None if they aren't known."""
    found = masses(energy, x)
    if found is None or energy.mode_masses is None:
        return None
    return 0.5 * (found - energy.mode_masses).abs().sum().item()


def measure(energy: Energy, x: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Measure samples (N, D) by whatever is known of the law.

    Keys: mean_energy; of laws that can be sampled, transport, the mean over `EXACT_SETS`, and exact_energy;
    where modes are known, modes_found and mass_error, the total variation of the mode masses.
    """
    with torch.no_grad():
        found = {"mean_energy": energy.energy(x.double()).mean().item()}
        sets = [each for _ in range(EXACT_SETS) if (each := energy.sample(len(x), generator)) is not None]
        if sets:
            found["transport"] = sum(transport_cost(x, exact) for exact in sets) / len(sets)
            found["exact_energy"] = energy.energy(torch.cat(sets)).mean().item()
    shares, error = masses(energy, x), total_variation(energy, x)
    if shares is not None and error is not None:
        found["modes_found"] = float((shares > 0).sum())
        found["mass_error"] = error
    return found


def floor(energy: Energy, number: int, generator: torch.Generator) -> dict[str, float]:
    """Measure `EXACT_SETS` exact sets as if a sampler had drawn them: means; nothing where there are none."""
    sets = [each for _ in range(EXACT_SETS) if (each := energy.sample(number, generator)) is not None]
    found = [measure(energy, exact, generator) for exact in sets]
    return {key: sum(each[key] for each in found) / len(found) for key in found[0]} if found else {}
