"""Samplers of energies: settings, an iteration, samples with their path weights."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from am_diffusers.samplers.energies.base import Energy
from am_diffusers.samplers.parts.gradients import Gradients
from am_diffusers.system.ranges import COUNT, POSITIVE, STEPS, Range

SHARE = Range(float, "at least 0 and below 1", lambda number: 0 <= number < 1)
FROM_ZERO_TO_ONE = Range(float, "from 0 to 1", lambda number: 0 <= number <= 1)
UP_TO_ONE = Range(float, "above 0 and at most 1", lambda number: 0 < number <= 1)


def flag(range_: Range, default: float | None, text: str) -> Any:
    """Declare a setting: its range, its default (None = taken from the energy) and its sentence."""
    return field(default=default, metadata={"range": range_, "help": text})


@dataclass(frozen=True)
class Settings:
    """Settings of all samplers. None = taken from the energy's spread, width and dimension by `resolved`.

    Raises:
        ValueError: a number is out of its range; names it.
    """

    iterations: int = flag(COUNT, 1000, "iterations: roll-outs, then gradient steps")
    batch_size: int = flag(COUNT, 256, "paths simulated an iteration")
    num_steps: int = flag(STEPS, 32, "steps of a path, at least 2")
    gradient_steps: int = flag(COUNT, 20, "gradient steps an iteration; few, or fits run ahead of the paths")
    row_batch_size: int = flag(COUNT, 512, "rows of a gradient step")
    buffer_size: int = flag(COUNT, 10_000, "paths kept, first in, first out")
    learning_rate: float = flag(POSITIVE, 1e-3, "of Adam")
    ema_decay: float = flag(SHARE, 0.99, "decay per step of the averaged weights that paths follow")
    hidden: int = flag(COUNT, 96, "width of the networks' three hidden layers")
    clip: float | None = flag(
        POSITIVE, None, "largest norm of the energy's gradient; 1.5 sqrt(dimension) / width"
    )
    spread: float | None = flag(POSITIVE, None, "standard deviation of a coordinate, roughly; the energy's")
    width: float | None = flag(POSITIVE, None, "standard deviation of the narrowest mode; the energy's")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, allowed = getattr(self, each.name), each.metadata["range"]
            if value is not None and not allowed.holds(value):
                raise ValueError(f"--{each.name} must be {allowed.rule}, got {value}")
        if self.num_steps < 2:
            raise ValueError(f"--num_steps must be at least 2, got {self.num_steps}")

    def resolved(self, energy: Energy) -> "Settings":
        """Return the settings with those that were None filled in from the energy."""
        spread, width = self.spread or energy.spread, self.width or energy.width
        clip = self.clip or 1.5 * math.sqrt(energy.dimension) / width
        return self.filled({"spread": spread, "width": width, "clip": clip})

    def filled(self, values: Mapping[str, float]) -> "Settings":
        """Return the settings with those that are None taken from `values`."""
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)


class Drawn(NamedTuple):
    """Samples (B, D), and the log weights (B,) that make their paths those wanted, constants included.

    The mean of exp(log weights) is Z, the mean of the log weights a lower bound of log Z.
    """

    x: Tensor
    log_weights: Tensor


class Sampler:
    """Learns to draw from exp(-energy), one iteration after the other.

    Noise is a function of (seed, iteration): a resumed run needs no generator state.

    Args:
        energy: what to sample.
        settings: resolved ones of this class.
        seed: seeds the networks' weights and all noise.

    Attributes:
        title, paper: how papers call it, its arXiv number.
        Settings: class of its settings.
        gradients: the energy's, counted.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[Settings]]

    def __init__(self, energy: Energy, settings: Any, seed: int) -> None:
        self.energy, self.settings, self.seed = energy, settings, seed
        self.gradients = Gradients(energy, settings.clip)

    def iterate(self, iteration: int) -> dict[str, float]:
        """Simulate paths, keep them, take gradient steps; return metrics."""
        raise NotImplementedError

    def draw(self, number: int, generator: torch.Generator) -> Drawn:
        """Draw samples with the averaged control; their energies are not counted as training's."""
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """Return what an iteration changes, by name: each has `state_dict` and `load_state_dict`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"calls": self.gradients.calls} | {
            name: part.state_dict() for name, part in self.parts().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.gradients.calls = state["calls"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
