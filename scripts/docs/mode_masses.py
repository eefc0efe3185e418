"""Draw what samplers by adjoints make of the masses of two separated modes: docs/images/mode_masses.png.

    python scripts/docs/mode_masses.py

The law is .3 N(-2, .25) + .7 N(2, .25) on a line. Controls are means by bin, so that no network errs; what
differs from .3 is the sampler's. Takes about a minute of CPU.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from am_diffusers.noise import generator_for
from am_diffusers.reciprocal import brownian, noise_levels, reciprocal_rows, steer
from am_diffusers.samplers.base import Drawn
from am_diffusers.samplers.energies.base import log_normal
from am_diffusers.samplers.energies.gaussian_mixture import GaussianMixture
from am_diffusers.samplers.metrics import path_weights, resampled
from am_diffusers.samplers.naas import Annealing
from am_diffusers.samplers.parts.gradients import Gradients
from am_diffusers.samplers.parts.networks import rows_of
from am_diffusers.system.files import write_whole
from am_diffusers.velocity import CallableField

FILE = Path(__file__).parents[2] / "docs" / "images" / "mode_masses.png"
MASS = 0.3
LAW = GaussianMixture(torch.tensor([[-2.0], [2.0]]), torch.tensor([MASS, 1 - MASS]), 0.5)
EDGE, BINS = 6.0, 120


class BinnedControl:
    """A control on a line by bins of x and levels.

    Args:
        levels: at which it is known, (K,), decreasing.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.values = levels, torch.zeros(len(levels), BINS, dtype=torch.float64)
        self.field = CallableField(lambda x, level, cond: self.values[self._row(level[0])][self._bins(x)])

    def _row(self, level: Tensor) -> int:
        return int((self.levels - level).abs().argmin())

    def _bins(self, x: Tensor) -> Tensor:
        return ((x + EDGE) * (BINS / (2 * EDGE))).long().clamp(0, BINS - 1)

    def fit(self, row: int, x: Tensor, target: Tensor, damping: float) -> None:
        """Move a level's bins towards the means of the targets there; empty bins stay."""
        where, target = self._bins(x)[:, 0], target[:, 0]
        count = torch.bincount(where, minlength=BINS)
        total = torch.zeros(BINS, dtype=torch.float64).index_add_(0, where, target)
        filled = count > 0
        fresh = total[filled] / count[filled]
        self.values[row, filled] += damping * (fresh - self.values[row, filled])


class Sweep(NamedTuple):
    """Samples drawn before a sweep: mass of the left mode, Kolmogorov distance, path weights."""

    mass: float
    distance: float
    elbo: float
    effective_share: float
    resampled_mass: float


def summarise(drawn: Drawn, number: int) -> Sweep:
    """Measure samples and their path weights."""
    weights = path_weights(drawn.log_weights)
    again = resampled(drawn, number, generator_for("again"))
    x = drawn.x[:, 0].sort().values
    cumulated = sum(
        mass * torch.special.ndtr((x - mean) / LAW.width)
        for mass, mean in zip(LAW.masses, LAW.means[:, 0], strict=True)
    )
    steps = torch.arange(1, number + 1, dtype=torch.float64) / number
    left = [(values < 0).double().mean().item() for values in (drawn.x, again)]
    return Sweep(
        left[0], (cumulated - steps).abs().max().item(), weights.elbo, weights.effective_share, left[1]
    )


def adjoint_sampling(sweeps: int, number: int, *, nu: float = 2.5, num_steps: int = 60) -> list[Sweep]:
    """Run Adjoint Sampling from 0, damped by .3: one record before each sweep, one at the end."""
    table = brownian(noise_levels(num_steps, 0.03), nu)
    control, gradients = BinnedControl(table.sigmas[:-1]), Gradients(LAW)
    source, found = torch.zeros(number, 1, dtype=torch.float64), []
    for sweep in range(sweeps + 1):
        generator = generator_for("adjoint_sampling", sweep)

        def normal(_: int = 0, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(number, 1, generator=generator).double()

        end, log_ratio = steer(control.field, table, rows_of(number), source, normal)
        _, gradient = gradients(end)
        log_weights = log_ratio - LAW.energy(end) - log_normal(end, 0.0, nu**2)
        found.append(summarise(Drawn(end, log_weights), number))
        for row, level in enumerate(control.levels):
            rows = reciprocal_rows(
                source, end, gradient - end / nu**2, level.expand(number), nu, normal(), rows_of(number)
            )
            control.fit(row, rows.latents, rows.target, 0.3)
    return found


def annealed(
    sweeps: int, number: int, *, source_from: int | None, prior: float = 2.0, num_steps: int = 100
) -> list[Sweep]:
    """Run the annealed sampler, its source stage from a sweep on (None = never), damped by .3."""
    annealing = Annealing(Gradients(LAW), prior, num_steps, 1.0)
    table = brownian(noise_levels(20, 0.1), prior)
    levels = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    control, stage = BinnedControl(levels), BinnedControl(table.sigmas[:-1])
    origin, found = torch.zeros(number, 1, dtype=torch.float64), []
    for sweep in range(sweeps + 1):
        generator = generator_for("annealed", sweep)

        def normal(_: int = 0, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(number, 1, generator=generator).double()

        source, stage_ratio = steer(stage.field, table, rows_of(number), origin, normal)
        paths = annealing.paths(control.field, source, generator)
        log_weights = paths.log_ratio + stage_ratio - LAW.energy(paths.states[-1])
        drawn = Drawn(paths.states[-1], log_weights - log_normal(source, 0.0, prior**2))
        found.append(summarise(drawn, number))
        for k in range(num_steps):
            control.fit(k, paths.states[k], -paths.adjoints[k + 1], 1.0)
        if source_from is not None and sweep >= source_from:
            for row, level in enumerate(stage.levels):
                rows = reciprocal_rows(
                    origin, source, paths.adjoints[0], level.expand(number), prior, normal(), rows_of(number)
                )
                stage.fit(row, rows.latents, rows.target, 0.3)
    return found


def main() -> None:
    sweeps, number = 16, 20_000
    curves = {
        "Adjoint Sampling": adjoint_sampling(sweeps, number),
        "annealed, no source stage": annealed(sweeps, number, source_from=None),
        "annealed, source stage from sweep 4": annealed(sweeps, number, source_from=4),
    }
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(MASS, color="#555555", lw=1, label="exact")
    for (name, curve), colour in zip(curves.items(), ("#d1495b", "#00798c", "#3a7d44"), strict=True):
        axes.plot([each.mass for each in curve], color=colour, label=name)
        shown = [each.resampled_mass if each.effective_share > 0.1 else math.nan for each in curve]
        axes.plot(shown, color=colour, ls=":", lw=1.2)
        last = curve[-1]
        values = {key: round(value, 3) for key, value in last._asdict().items()}
        print(f"{name}: mass {curve[0].mass:.3f} before, in the end {values}")
    axes.set(xlabel="sweep", ylabel="mass of the left mode", ylim=(0.25, 0.6))
    axes.set_title("Two modes of mass .3 and .7; dotted: resampled by path weights", fontsize=9)
    axes.legend(fontsize=8)
    write_whole(FILE, lambda part: figure.savefig(part, format="png", dpi=100))


if __name__ == "__main__":
    main()
