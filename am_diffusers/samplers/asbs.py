"""The adjoint Schroedinger bridge sampler: a source that is a law, a learned corrector (2506.22565).

    corrector h:  regression on (source - X) / nu^2 at the ends X of the current control
    control w:    regression on -(grad E(X) + h(X)) at bridge points between sources and ends

The two alternate, the corrector first: its first block belongs to the uncontrolled reference. The buffer
keeps sources, so that h is always today's.

Path weights compare with the reference given its end: they give log Z and a valid bound, but even those of
the perfect bridge vary, as it couples source and end otherwise.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_diffusers.noise import generator_for
from am_diffusers.reciprocal import corrector_rows
from am_diffusers.samplers.adjoint_sampling import AdjointSampling, BridgeSettings
from am_diffusers.samplers.base import Settings, flag
from am_diffusers.samplers.energies.base import Energy
from am_diffusers.samplers.parts.buffer import Buffer
from am_diffusers.samplers.parts.networks import make_trained, rows_of
from am_diffusers.system.ranges import COUNT, POSITIVE


@dataclass(frozen=True)
class ASBSSettings(BridgeSettings):
    """Settings of the bridge sampler; nu and the source's deviation are .75 times the spread unless given."""

    source_std: float | None = flag(POSITIVE, None, "standard deviation of the Gaussian source")
    corrector_iterations: int = flag(COUNT, 20, "iterations of a block of the corrector")
    control_iterations: int = flag(COUNT, 80, "iterations of a block of the control")

    def resolved(self, energy: Energy) -> Settings:
        """See `Settings.resolved`."""
        filled = super().resolved(energy)
        assert filled.spread is not None
        return filled.filled({"nu": 0.75 * filled.spread, "source_std": 0.75 * filled.spread})


class ASBS(AdjointSampling):
    """See the module's docstring."""

    title, paper = "Adjoint Schroedinger Bridge Sampler", "2506.22565"
    Settings = ASBSSettings

    def __init__(self, energy: Energy, settings: ASBSSettings, seed: int) -> None:
        super().__init__(energy, settings, seed)
        assert settings.source_std is not None
        self.source_deviation = settings.source_std
        self.learned = make_trained(self, "corrector", nu=self.nu)
        self.ends = Buffer(settings.buffer_size)

    def parts(self) -> dict[str, Any]:
        """See `Sampler.parts`."""
        return super().parts() | {"corrector": self.learned, "ends": self.ends}

    def source(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw where paths start: Gaussian."""
        return self.source_deviation * torch.randn(number, self.energy.dimension, generator=generator)

    def corrector(self, source: Tensor, end: Tensor) -> Tensor:
        """Learned gradient of what the reference makes of the source, at the ends."""
        with torch.no_grad():
            return self.learned.field(end, end.new_zeros(len(end)), rows_of(len(end)))

    def iterate(self, iteration: int) -> dict[str, float]:
        """See `Sampler.iterate`."""
        s = self.settings
        place = iteration % (s.corrector_iterations + s.control_iterations)
        if place >= s.corrector_iterations:
            return super().iterate(iteration)
        if place == 0:
            self.ends.clear()  # those of an older control
        generator = generator_for(self.seed, iteration)
        source, end, _ = self.paths(s.batch_size, generator)
        self.ends.push({"source": source, "end": end})
        losses = []
        for _ in range(s.gradient_steps):
            kept = self.ends.draw(s.row_batch_size, generator)
            rows = corrector_rows(kept["source"], kept["end"], self.nu, rows_of(s.row_batch_size))
            losses.append(self.learned.step(rows))
        return {"corrector_loss": sum(losses) / len(losses)}
