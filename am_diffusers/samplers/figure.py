"""The picture of a sampler's run: samples on the density, in two coordinates."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy
from am_diffusers.system.files import write_whole

GRID, SHOWN, DEPTH = 200, 2000, 12.0


def draw_samples(file: Path, energy: Energy, x: Tensor, exact: Tensor | None, title: str) -> None:
    """Draw samples in their first two coordinates; in one dimension a histogram.

    Under them is the density, of more than two dimensions exact samples where there are some.

    Args:
        file: PNG to write.
        energy: whose law they should have.
        x: samples, (N, D).
        exact: exact samples, (N, D).
        title: above it.
    """
    figure = Figure(figsize=(5.2, 5), layout="constrained")
    axes = figure.subplots()
    points, reference = x[:SHOWN].double(), None if exact is None else exact[:SHOWN]
    if x.shape[1] == 1:
        _histogram(axes, energy, points)
    else:
        if x.shape[1] == 2:
            _density(axes, energy, torch.cat([points, points if reference is None else reference]))
        elif reference is not None:
            axes.scatter(*reference[:, :2].T, s=4, color="#999999", label="exact")
        axes.scatter(*points[:, :2].T, s=4, color="#d1495b", alpha=0.6, label="samples")
        axes.legend(loc="upper right")
        axes.set(xlabel="coordinate 1", ylabel="coordinate 2")
    axes.set_title(title, fontsize=10)
    write_whole(file, lambda part: figure.savefig(part, format="png", dpi=110))


def _limits(values: Tensor) -> tuple[float, float]:
    low, high = values.min().item(), values.max().item()
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def _density(axes: Axes, energy: Energy, points: Tensor) -> None:
    """Draw contours of the log density, down to `DEPTH` below its top."""
    x, y = (np.linspace(*_limits(points[:, i]), GRID) for i in range(2))
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1)).reshape(-1, 2)
    with torch.no_grad():
        height = -energy.energy(grid).reshape(GRID, GRID)
    height = (height - height.max()).clamp(min=-DEPTH)
    axes.contourf(x, y, height.numpy(), levels=24, cmap="Greys")


def _histogram(axes: Axes, energy: Energy, points: Tensor) -> None:
    x = np.linspace(*_limits(points), GRID)
    with torch.no_grad():
        density = (-energy.energy(torch.from_numpy(x)[:, None])).exp().numpy()
    axes.fill_between(x, density / np.trapezoid(density, x), color="#d9d9d9", label="density")
    axes.hist(points[:, 0].numpy(), bins=80, density=True, color="#d1495b", histtype="step", label="samples")
    axes.legend(loc="upper right")
