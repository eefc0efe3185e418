"""Non-equilibrium annealed adjoint sampling: a reference that already goes to the target (arXiv 2506.18165).

    U_b = (1 - b) |x|^2 / (2 prior^2) + b E(x),   b from 0 to 1 in K steps of h = 1 / K
    x'  = x + h D (-grad U_b(x) / 2 + w(x, k)) + sqrt(h D) xi
    running cost U_{k+1}(x_k) - U_k(x_k), no terminal cost;   source ~ exp(-U_0 - V_0)
    a_K = 0,  a_k = a_{k+1} - (h D / 2) Hess U_k(x_k) a_{k+1} + grad (U_{k+1} - U_k)(x_k)
    control w: regression on -a_{k+1} at the states x_k;   source stage: on -a_0 at Brownian bridges 0 -> x_0

The adjoint is the gradient of the cost to go, which at the source is V_0. The source is the end of a Brownian
stage of strength prior from 0, so that an untrained stage draws from exp(-U_0); its target has no corrector.
Without the stage the sampler is biased; fed with the adjoints of an untrained control it runs away: it begins
late, learns more slowly, and rows of the largest adjoints are left out.

Log weight of a path: that of the target's end with the steps run backward and of the reference's stage given
its end, against the path's own. It is constant at the optimum but for the size of the steps.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_diffusers.matching import MatchingBatch, QuantileMask
from am_diffusers.noise import generator_for
from am_diffusers.reciprocal import brownian, noise_levels, reciprocal_rows, steer
from am_diffusers.samplers.base import FROM_ZERO_TO_ONE, UP_TO_ONE, Drawn, Sampler, Settings, flag
from am_diffusers.samplers.energies.base import Energy, log_normal
from am_diffusers.samplers.parts.buffer import Buffer
from am_diffusers.samplers.parts.gradients import Gradients
from am_diffusers.samplers.parts.networks import make_trained, rows_of
from am_diffusers.system.ranges import COUNT, POSITIVE, STEPS
from am_diffusers.velocity import VelocityField

STAGE_STEPS, STAGE_LOWEST = 40, 0.1


class AnnealedPaths(NamedTuple):
    """Paths of an annealed reference under a control.

    Attributes:
        states: x_0 .. x_K, (K + 1, B, D).
        adjoints: a_0 .. a_K, (K + 1, B, D); empty if not asked for.
        log_ratio: log of the steps run backward from x_K over those forward, (B,).
    """

    states: Tensor
    adjoints: Tensor
    log_ratio: Tensor


@dataclass(frozen=True)
class Annealing:
    """The annealed reference.

    Attributes:
        gradients: the energy's, clipped.
        prior: standard deviation of exp(-U_0).
        num_steps: K.
        diffusion: D; h D / (2 width^2) should stay below .3.
    """

    gradients: Gradients
    prior: float
    num_steps: int
    diffusion: float

    def paths(
        self,
        control: VelocityField,
        source: Tensor,
        generator: torch.Generator,
        *,
        adjoints: bool = True,
    ) -> AnnealedPaths:
        """Simulate K steps from the source (B, D), then sweep the adjoint back: K + 1 energies a path."""
        variance = self.diffusion / self.num_steps
        cond, states, graphs = rows_of(len(source)), [source], []
        log_ratio, noise = source.new_zeros(len(source)), torch.zeros_like(source)
        for k in range(self.num_steps + 1):
            leaf, _, gradient = self.gradients.differentiable(states[k], create_graph=adjoints)
            share = k / self.num_steps
            slope = (1 - share) / self.prior**2 * states[k] + share * gradient.detach()
            if k:  # the step that led here, run backward
                back = (states[k - 1] - states[k] + 0.5 * variance * slope).square().sum(1)
                log_ratio = log_ratio + 0.5 * noise.square().sum(1) - 0.5 * back / variance
            if k == self.num_steps:
                break
            graphs.append((leaf, gradient))
            with torch.no_grad():
                w = control(states[k], source.new_full((len(source),), 1 - share), cond)
            noise = torch.randn(source.shape, generator=generator, dtype=source.dtype)
            states.append(states[k] + variance * (w - 0.5 * slope) + variance**0.5 * noise)
        found = self._sweep(states, graphs) if adjoints else []
        return AnnealedPaths(
            torch.stack(states), torch.stack(found) if found else source.new_empty(0), log_ratio
        )

    def _sweep(self, states: list[Tensor], graphs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return a_0 .. a_K; each step one product with the Hessian, by the graph of its gradient."""
        half, found = 0.5 * self.diffusion / self.num_steps, [torch.zeros_like(states[-1])]
        for k in reversed(range(self.num_steps)):
            (leaf, gradient), share, a = graphs[k], k / self.num_steps, found[-1]
            (product,) = torch.autograd.grad(gradient, leaf, a, allow_unused=True)
            hessian = (1 - share) / self.prior**2 * a + share * (0.0 if product is None else product)
            cost = (gradient.detach() - states[k] / self.prior**2) / self.num_steps
            found.append(a - half * hessian + cost)
        return found[::-1]


@dataclass(frozen=True)
class NAASSettings(Settings):
    """Settings of annealed sampling; by the energy's spread and width unless given."""

    num_steps: int = flag(STEPS, 100, "steps of a path, at least 2")
    batch_size: int = flag(COUNT, 64, "paths simulated an iteration, num_steps energies each")
    buffer_size: int = flag(COUNT, 1000, "paths kept, first in, first out")
    prior_std: float | None = flag(POSITIVE, None, "standard deviation of the annealing's first law; spread")
    diffusion: float | None = flag(
        POSITIVE, None, "D of the annealed dynamics over time 1; num_steps * width^2 / 2"
    )
    source_start: float = flag(
        FROM_ZERO_TO_ONE, 0.3, "share of the iterations before the source stage learns; 1 = it never does"
    )
    source_rate: float = flag(POSITIVE, 0.2, "learning rate of the source stage over the control's")
    keep_quantile: float = flag(UP_TO_ONE, 0.9, "share of the source stage's rows that count; 1 = all")

    def resolved(self, energy: Energy) -> Settings:
        """See `Settings.resolved`."""
        filled = super().resolved(energy)
        assert filled.spread is not None
        assert filled.width is not None
        return filled.filled(
            {"prior_std": filled.spread, "diffusion": 0.5 * self.num_steps * filled.width**2}
        )


class NAAS(Sampler):
    """See the module's docstring."""

    title, paper = "Non-equilibrium Annealed Adjoint Sampler", "2506.18165"
    Settings = NAASSettings

    def __init__(self, energy: Energy, settings: NAASSettings, seed: int) -> None:
        super().__init__(energy, settings, seed)
        assert settings.prior_std is not None
        assert settings.diffusion is not None
        self.prior = settings.prior_std
        self.annealing = Annealing(self.gradients, self.prior, settings.num_steps, settings.diffusion)
        self.stage_table = brownian(noise_levels(STAGE_STEPS, STAGE_LOWEST), self.prior)
        self.control = make_trained(self, "control", nu=self.prior)
        self.stage = make_trained(self, "stage", nu=self.prior, rate=settings.source_rate)
        self.buffer = Buffer(settings.buffer_size * settings.num_steps)
        self.sources = Buffer(settings.buffer_size)
        self.mask = QuantileMask(settings.keep_quantile) if settings.keep_quantile < 1 else None

    def parts(self) -> dict[str, Any]:
        """See `Sampler.parts`."""
        found: dict[str, Any] = {"control": self.control, "stage": self.stage}
        found |= {"buffer": self.buffer, "sources": self.sources}
        return found | ({} if self.mask is None else {"mask": self.mask})

    def sources_of(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw sources by the stage, with log dP_reference / dP_stage."""
        origin = torch.zeros(number, self.energy.dimension)
        end, log_ratio = steer(
            self.stage.field,
            self.stage_table,
            rows_of(number),
            origin,
            lambda _: torch.randn(origin.shape, generator=generator),
        )
        return end, log_ratio

    def iterate(self, iteration: int) -> dict[str, float]:
        """See `Sampler.iterate`."""
        s, generator = self.settings, generator_for(self.seed, iteration)
        source, _ = self.sources_of(s.batch_size, generator)
        states, adjoints, _ = self.annealing.paths(self.control.field, source, generator)
        steps = torch.arange(s.num_steps).repeat_interleave(s.batch_size)
        rows = {"state": states[:-1].flatten(0, 1), "target": -adjoints[1:].flatten(0, 1), "step": steps}
        self.buffer.push(rows)
        self.push_sources(source, adjoints[0])
        losses = [self.control.step(self.control_rows(generator)) for _ in range(s.gradient_steps)]
        found = {"loss": sum(losses) / len(losses), "adjoint_norm": adjoints[0].norm(dim=1).mean().item()}
        if iteration >= s.source_start * s.iterations:
            losses = [self.stage.step(self.source_rows(generator)) for _ in range(s.gradient_steps)]
            found["source_loss"] = sum(losses) / len(losses)
        return found

    def push_sources(self, source: Tensor, adjoint: Tensor) -> None:
        """Keep sources with their adjoints, those of the largest norms left out."""
        squared = adjoint.square().sum(1, keepdim=True)
        if self.mask is not None:
            self.mask.update([0], squared)
            kept = self.mask.keep([0], squared)[:, 0]
            source, adjoint = source[kept], adjoint[kept]
        self.sources.push({"source": source, "adjoint": adjoint})

    def control_rows(self, generator: torch.Generator) -> MatchingBatch:
        """Rows of the control's regression: states of kept paths at random steps."""
        number = self.settings.row_batch_size
        kept = self.buffer.draw(number, generator)
        levels = 1 - kept["step"] / self.settings.num_steps
        weight = (self.prior * levels).square() + self.settings.width**2
        return MatchingBatch(
            latents=kept["state"],
            sigmas=levels,
            target=kept["target"],
            weight=weight / number,
            samples=torch.arange(number),
            cond=rows_of(number),
        )

    def source_rows(self, generator: torch.Generator) -> MatchingBatch:
        """Rows of the source stage's regression, on bridges from 0 at log-uniform levels."""
        number = self.settings.row_batch_size
        kept = self.sources.draw(number, generator)
        source, levels = kept["source"], STAGE_LOWEST ** torch.rand(number, generator=generator)
        noise = torch.randn(source.shape, generator=generator)
        return reciprocal_rows(
            torch.zeros_like(source),
            source,
            kept["adjoint"],
            levels,
            self.prior,
            noise,
            rows_of(number),
            weight=(self.prior * levels).square(),
        )

    def draw(self, number: int, generator: torch.Generator) -> Drawn:
        """See `Sampler.draw`."""
        source, stage_ratio = self.sources_of(number, generator)
        uncounted = Gradients(self.energy, self.gradients.limit)
        annealing = Annealing(uncounted, self.prior, self.settings.num_steps, self.annealing.diffusion)
        states, _, log_ratio = annealing.paths(self.control.field, source, generator, adjoints=False)
        end = states[-1]
        with torch.no_grad():
            value = self.energy.energy(end.double())
        prior = log_normal(source.double(), 0.0, self.prior**2)
        return Drawn(end, log_ratio.double() + stage_ratio.double() - value - prior)
