"""Adjoint Sampling: a control from a point at 0, learned on bridges to its own ends (arXiv 2504.11713).

    control w:  regression on -(grad E(X) - X / nu^2) at bridge points between 0 and the ends X of w
    log weight of a path: log dP_reference / dP_control - E(X) - log N(X; 0, nu^2 I)

An iteration simulates ends with the averaged control, keeps them with the clipped gradient of their energy,
and takes gradient steps on rows of that buffer with new bridge points. In the beginning the energy is ramped
in from that of the uncontrolled ends: else paths are thrown into the first modes that they see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch
from am_diffusers.noise import generator_for
from am_diffusers.reciprocal import brownian, noise_levels, reciprocal_rows, steer
from am_diffusers.samplers.base import SHARE, Drawn, Sampler, Settings, flag
from am_diffusers.samplers.energies.base import Energy, log_normal
from am_diffusers.samplers.parts.buffer import Buffer
from am_diffusers.samplers.parts.networks import Trained, make_trained, rows_of
from am_diffusers.system.ranges import POSITIVE


@dataclass(frozen=True)
class BridgeSettings(Settings):
    """Settings of samplers whose paths are Brownian bridges."""

    nu: float | None = flag(
        POSITIVE, None, "strength of the Brownian reference, at most twice the target's deviation"
    )
    energy_warmup: float = flag(SHARE, 0.4, "share of the iterations over which the energy is ramped in")


@dataclass(frozen=True)
class AdjointSamplingSettings(BridgeSettings):
    """Settings of Adjoint Sampling; nu is 1.5 times the spread unless given."""

    def resolved(self, energy: Energy) -> Settings:
        """See `Settings.resolved`."""
        filled = super().resolved(energy)
        assert filled.spread is not None
        return filled.filled({"nu": 1.5 * filled.spread})


class AdjointSampling(Sampler):
    """See the module's docstring."""

    title, paper = "Adjoint Sampling", "2504.11713"
    Settings = AdjointSamplingSettings
    source_deviation = 0.0

    def __init__(self, energy: Energy, settings: BridgeSettings, seed: int) -> None:
        super().__init__(energy, settings, seed)
        assert settings.nu is not None
        assert settings.width is not None
        self.nu, self.lowest = settings.nu, min(0.5, 0.5 * settings.width / settings.nu)
        self.table = brownian(noise_levels(settings.num_steps, self.lowest), self.nu)
        self.control = make_trained(self, "control", nu=self.nu)
        self.buffer = Buffer(settings.buffer_size)

    def parts(self) -> dict[str, Trained | Buffer]:
        """See `Sampler.parts`."""
        return {"control": self.control, "buffer": self.buffer}

    def source(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw where paths start: 0."""
        return torch.zeros(number, self.energy.dimension)

    def corrector(self, source: Tensor, end: Tensor) -> Tensor:
        """Gradient of what the reference makes of the source, at the ends: -end / nu^2."""
        return -end / self.nu**2

    def iterate(self, iteration: int) -> dict[str, float]:
        """See `Sampler.iterate`."""
        generator = generator_for(self.seed, iteration)
        value, norm = self.simulate(generator)
        ramp = min(1.0, (iteration + 1) / max(1.0, self.settings.energy_warmup * self.settings.iterations))
        losses = [self.control.step(self.rows(ramp, generator)) for _ in range(self.settings.gradient_steps)]
        return {"loss": sum(losses) / len(losses), "energy": value, "gradient_norm": norm, "ramp": ramp}

    def simulate(self, generator: torch.Generator) -> tuple[float, float]:
        """Push paths of the averaged control; return the mean energy and norm of the clipped gradients."""
        source, end, _ = self.paths(self.settings.batch_size, generator)
        value, gradient = self.gradients(end)
        self.buffer.push({"source": source, "end": end, "gradient": gradient})
        return value.mean().item(), gradient.norm(dim=1).mean().item()

    def paths(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Sources, ends and log dP_reference / dP_control of paths of the averaged control."""
        source = self.source(number, generator)
        end, log_ratio = steer(
            self.control.field,
            self.table,
            rows_of(number),
            source,
            lambda _: torch.randn(source.shape, generator=generator),
        )
        return source, end, log_ratio

    def rows(self, ramp: float, generator: torch.Generator) -> MatchingBatch:
        """Rows of the control's regression from the buffer, at log-uniform levels."""
        number = self.settings.row_batch_size
        kept = self.buffer.draw(number, generator)
        source, end = kept["source"], kept["end"]
        reference = end / (self.source_deviation**2 + self.nu**2)
        adjoint = ramp * kept["gradient"] + (1 - ramp) * reference + self.corrector(source, end)
        levels = self.lowest ** torch.rand(number, generator=generator)
        noise = torch.randn(source.shape, generator=generator)
        weight = (self.nu * levels).square() + self.settings.width**2
        return reciprocal_rows(source, end, adjoint, levels, self.nu, noise, rows_of(number), weight=weight)

    def draw(self, number: int, generator: torch.Generator) -> Drawn:
        """See `Sampler.draw`."""
        _, end, log_ratio = self.paths(number, generator)
        variance = self.source_deviation**2 + self.nu**2
        with torch.no_grad():
            value = self.energy.energy(end.double())
        return Drawn(end, log_ratio.double() - value - log_normal(end.double(), 0.0, variance))
