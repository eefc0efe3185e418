"""Efficient Adjoint Matching (arXiv 2605.11480): a reconstruction, with a linear base and no trajectories.

Aims at the law of Adjoint Matching, p_base(clean) * exp(reward_scale * reward(clean)). Its base is a linear
SDE, so the adjoint is known in closed form (linear_base.py) and any sampler of the policy provides end
points. An iteration, for each sample:

1. clean = the end of the policy's ODE, in second-order steps; its reward and the reward's gradient.
2. `renoised`: the base's score near `clean`, from its velocity at `clean` noised to `sigma`.
   `stopped`: the ODE halts at x_e, noise level `sigma`; the base's velocity there gives its score, and the
   gradient of V^ = reward of x_e's base clean estimate, through the base. Nothing below `sigma` is trained.
3. `rows` regression points: sigma uniform in each of as many equal parts of (0, 1] (of (`sigma`, 1]), the end
   point noised to it, the target of linear_base.py.

Passes through the network a sample: as many policy calls as the ODE has steps, one base call (`renoised`) or
one base vjp (`stopped`), and the regression's `rows`.

A row weighs min(2 (1 - s) / s, max_weight) / number of ODE steps, what a step of a memoryless rollout of so
many steps weighs in Adjoint Matching, and the loss is the mean over rows: losses and gradient norms, hence
learning rate and clipping, keep the size they have there.

Which law is learned: the tilt, if the policy's few-step ODE samples the law of its velocities and the score
is exact. Both are approximations. Errors of the ODE are distilled into the policy again and again, the more
the smaller C: on N(.3, .5) with a quadratic reward, C = .05 and 10 steps, the std learned would be .34 with
Euler's method, is .48 with the second-order one and should be .50. `renoised` smooths the score: its relative
error, `sigma`^2 / (t^2 variance of the data + `sigma`^2), is 1 % on data of variance 1 at `sigma` .1 (15 % at
.3) and over half across the thin sheets that latents lie on, off which the reward's raw gradient then leads.
`stopped` keeps to them, as the gradient passes through the base, and its targets scatter less, but V^ is the
reward of a mean, not the value.
`variance` (C) changes how targets scatter, not their mean: C -> 0 is self-distillation (`renoised`), large C
target score matching; .01 to .1 times the variance of the latents is best. The reward then acts slowly, at
sigma = 1 by a factor C (`renoised`) or m_e / t_e (`stopped`).
The paper's constants, weights and score approximation aren't known to agree with these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.adjoint import lean_adjoint
from am_diffusers.divergences import Tilt
from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.parts import linear_base
from am_diffusers.methods.parts.reports import AdjointMonitor, end_point_statistics, everywhere, means
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import Trajectory, sample_ode
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import PLAIN, GradientOptions, RewardOfLatents, Terminal, TerminalCost
from am_diffusers.transitions import ode_euler
from am_diffusers.velocity import Conditioning, VelocityField, interpolate, score_from_velocity


@dataclass(frozen=True)
class EfficientSettings:
    """Choices of Efficient Adjoint Matching.

    Attributes:
        reward_scale: lambda of the tilt exp(lambda * reward), > 0.
        variance: C, of the linear base's Gaussian data, in squared latent units, > 0.
        score: `stopped` or `renoised`, see the module docstring.
        sigma: noise level of the score or of the stop, in (0, 1).
        rows: regression points a sample, at least 1.
        max_weight: largest 2 (1 - s) / s, > 0.
        collect_batch_size: samples rolled out at once; all by default.
        offload: keep latents and targets on the CPU until the loss of their rows is taken.
        gradient: how the reward's gradient is taken.
        tilt: the law aimed at, if it isn't p_base * exp(reward_scale * reward).

    Raises:
        ValueError: if a setting is out of range.
    """

    reward_scale: float
    variance: float = 0.05
    score: Literal["stopped", "renoised"] = "stopped"
    sigma: float = 0.3
    rows: int = 4
    max_weight: float = 20.0
    collect_batch_size: int | None = None
    offload: bool = False
    gradient: GradientOptions = PLAIN
    tilt: Tilt | None = None

    def __post_init__(self) -> None:
        for name in ("reward_scale", "variance", "rows", "max_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 < self.sigma < 1:
            raise ValueError(f"sigma must be in (0, 1), got {self.sigma}")
        if self.score not in ("renoised", "stopped"):
            raise ValueError(f"score must be renoised or stopped, got {self.score!r}")


class Start(NamedTuple):
    """States that rows are noised from.

    Attributes:
        x: clean pictures, or states at the noise level where the ODE stops, (B, ...).
        score: the base's score there, (B, ...).
        adjoint: gradient of the terminal cost there, (B, ...).
        terminal: rewards and what was made of their gradients.
    """

    x: Tensor
    score: Tensor
    adjoint: Tensor
    terminal: Terminal


class EfficientAdjointMatching(Method[MatchingBatch]):
    """Efficient Adjoint Matching from an ODE sampler of the policy.

    Args:
        policy: field that is trained.
        base: field before fine-tuning.
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`, higher is better.
        sigmas: grid of the policy's ODE, (ode_steps + 1,), from 1 to 0; with score `stopped` it is
            compressed to end at `settings.sigma`.
        latents: shape, device and dtype of the latents.
        settings: reward scale, linear base, score, rows.
        rollout_policy: field the end points are sampled with, for instance `GuidedField(policy, 3.0)`; the
            policy itself by default.
        gather: concatenates a 1-D tensor over ranks; a single process by default.

    """

    needs_reward_gradient = True
    aims_at_tilt = False

    def __init__(
        self,
        policy: VelocityField,
        base: VelocityField,
        reward: RewardOfLatents,
        sigmas: Tensor,
        *,
        latents: LatentSpec,
        settings: EfficientSettings,
        rollout_policy: VelocityField | None = None,
        gather: Gather = gather_from_one,
    ) -> None:
        self.policy, self.base = policy, base
        self.terminal = TerminalCost(reward, settings.reward_scale, settings.gradient, settings.tilt)
        self.latents, self.settings = latents, settings
        self.rollout_policy, self.gather = rollout_policy or policy, gather
        self.lowest = settings.sigma if settings.score == "stopped" else 0.0
        self.sigmas = self.lowest + (1 - self.lowest) * sigmas
        self.monitor = AdjointMonitor()

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """End points, targets and rows of the samples, see `Method.collect`.

        Raises:
            NonFiniteError: if a reward or gradient is not finite.
            PhaseMemoryError: if memory runs out.
        """
        chunks, found = [], []
        for rows in torch.arange(len(cond)).split(self.settings.collect_batch_size or len(cond)):
            ids = rows.tolist()
            some = [generators[i] for i in ids]
            start = self._start(cond.index(ids), some)
            found.append(end_point_statistics(start.terminal, start.adjoint, start.score))
            chunk = self._rows(start, some)
            chunks.append([part.cpu() for part in chunk] if self.settings.offload else chunk)
        stats = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        columns = everywhere(stats, self.gather)
        self.terminal.update(columns["reward_gradient_norm"])
        latents, target, sigmas, weight = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        weight = weight / (self.settings.rows * len(columns["reward"]))  # a mean over the rows of all ranks
        samples = torch.arange(len(cond)).repeat_interleave(self.settings.rows)
        examples = MatchingBatch(latents, sigmas, target, weight, samples, cond)
        if self.settings.offload and torch.device(self.latents.device).type == "cuda":
            examples = examples.pin_memory()
        # There is one adjoint, that of the rows: what can be watched is its growth over iterations.
        warnings = self.monitor.update({len(self.sigmas) - 1: columns["adjoint_norm"].median().item()})
        return Collected(examples, stats["reward"], means(columns), warnings)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Share of the regression's loss that these rows contribute, see `Method.loss`."""
        return matching.matching_loss(self.policy, example.to(self.latents.device)), {}

    def state_dict(self) -> dict[str, Any]:
        """Threshold of clipping, reference of the adjoint norm."""
        return {"clip_norm": self.terminal.clip_norm, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.terminal.clip_norm = state["clip_norm"]
        self.monitor.load_state_dict(state.get("monitor", {}))

    def _start(self, cond: Conditioning, generators: Sequence[torch.Generator]) -> Start:
        """States to noise, where the policy's ODE leads."""
        noise = self.latents.draw(generators)
        if self.settings.score == "stopped":
            return self._stopped(cond, noise, generators)
        sigma = self.settings.sigma
        with phase("rollout", len(cond)):
            clean = sample_ode(self.rollout_policy, self.sigmas, cond, noise)
        terminal = self.terminal(clean, cond.prompts, lambda: self.latents.draw(generators))
        x = interpolate(clean, self.latents.draw(generators), sigma)
        with phase("rollout", len(cond)):
            velocity = self.base(x, x.new_full((len(x),), sigma), cond)
        score = linear_base.renoised_score(x, sigma, velocity)
        return Start(clean, score, terminal.adjoint, terminal)

    def _stopped(self, cond: Conditioning, noise: Tensor, generators: Sequence[torch.Generator]) -> Start:
        """States at the noise level where the ODE stops; one step of the base leads on to the reward."""
        with phase("rollout", len(cond)):
            x = sample_ode(self.rollout_policy, self.sigmas, cond, noise)
        to_the_end = ode_euler(torch.tensor([self.lowest, 0.0], dtype=torch.float64))
        last = Trajectory(x[None], x[None][1:], to_the_end, cond)
        found: list[Terminal] = []

        def terminal(final: Tensor) -> Tensor:
            found.append(self.terminal(final, cond.prompts, lambda: self.latents.draw(generators)))
            return found[0].adjoint

        with phase("adjoint", len(cond)):
            sweep = lean_adjoint(self.base, last, terminal, with_first=False)
        score = score_from_velocity(x, self.lowest, sweep.velocity_base[0])
        return Start(x, score, sweep.adjoints[0], found[0])

    def _rows(self, start: Start, generators: Sequence[torch.Generator]) -> list[Tensor]:
        """Latents and targets (B * rows, ...), sigmas and weights (B * rows,), sample by sample."""
        number, lowest = self.settings.rows, self.lowest
        sigma = torch.cat([linear_base.stratified_sigmas(number, lowest, g) for g in generators])
        noise = torch.stack([self.latents.draw(generators) for _ in range(number)], 1).flatten(0, 1)
        x_e, score, adjoint = (
            part.repeat_interleave(number, 0) for part in (start.x, start.score, start.adjoint)
        )
        x = linear_base.later_state(x_e, lowest, sigma, noise)
        target = linear_base.linear_target(
            x, sigma, x_e, lowest, score=score, adjoint=adjoint, variance=self.settings.variance
        )
        weight = linear_base.capped_weight(sigma, self.settings.max_weight) / (len(self.sigmas) - 1)
        return [x, target, sigma.to(start.x), weight.to(start.x)]
