"""Deterministic, truncated Adjoint Matching (arXiv 2605.06583). It does NOT sample the tilted law.

The policy's ODE is rolled out and the lean adjoint swept back along its last m steps only, under the base
(h_k = sigma_k - sigma_{k+1}):

    adjoint_K = -reward_scale * grad reward(x_K)
    adjoint_k = adjoint_{k+1} - h_k * J_base(x_k)^T adjoint_{k+1}
    target_k  = velocity_base(x_k) + |adjoint_{k+1}|^{(2-q)/(q-1)} adjoint_{k+1}
    loss      = mean over kept rows of h_k * |velocity_policy(x_k) - target_k|^2

It solves, for each noise by itself, min over controls u of sum h_k |u_k|^q / q - reward_scale * reward(x_K)
with velocity_policy = velocity_base - u (Pontryagin's principle: no Jacobian of the policy is needed).
`cost_power` is q > 1, and |.| the Euclidean norm of a whole latent, the reading under which
u* = -|a|^{(2-q)/(q-1)} a minimises |u|^q / q + a . u: for q other than 2 the size of a control depends on the
number of latent dimensions. Steps before the last m aren't trained; the last step, unlike in Adjoint
Matching, is the policy's and is trained too. Weights, masks and the pairing with adjoint_{k+1} are choices
made here, not the paper's.

What it converges to. Each end point of the base moves to where the reward gained balances the square of the
way, so the law of end points is pushed through a proximal map, of W2 type. On Gaussian data N(m, S^2 I), for
q = 2, all steps, K -> inf, lambda = reward_scale:

    x_tuned = argmin_x |x - x_base|^2 / (2 c) - lambda * reward(x),        c = S * pi / 2

    reward                  law learned                        tilt
    g . x                   N(m + c lambda g, S^2 I)           N(m + S^2 lambda g, S^2 I)
    -kappa |x - a|^2 / 2    std S / (1 + c lambda kappa)       std S / sqrt(1 + S^2 lambda kappa)

(c is S^2 times the integral over t of 1 / (t^2 S^2 + (1 - t)^2), the flow's gains.) Data narrower than pi / 2
move too far, by pi / (2 S), wider ones too little. A learned initial noise on top of this control doesn't
repair it; initial_noise.py says what does.

Passes through the network a sample: K policy calls, m-1 base vjps, one base call, and the regression's m.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.adjoint import AdjointSweep, truncated_adjoint
from am_diffusers.divergences import Tilt
from am_diffusers.matching import MatchingBatch, QuantileMask
from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.parts.control_cost import control_cost, optimal_control, step_length
from am_diffusers.methods.parts.reports import ADJOINT_NORM, AdjointMonitor, adjoint_norms, everywhere, means
from am_diffusers.methods.parts.rows import Rows, kept_batch, sample_rows
from am_diffusers.methods.parts.step_selection import Selected
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import Trajectory, rollout
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import PLAIN, GradientOptions, RewardOfLatents, Terminal, TerminalCost
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField

LABEL = (
    "deterministic_adjoint_matching does not sample base * exp(reward_scale * reward): it moves each picture "
    "of the base uphill against the square of the way (a proximal step)"
)


@dataclass(frozen=True)
class DeterministicSettings:
    """Choices of deterministic Adjoint Matching.

    Attributes:
        reward_scale: factor of the reward against the cost of the control, > 0.
        steps: m, the last so many steps of a rollout are trained; None = all.
        cost_power: q of the cost |u|^q / q, > 1.
        mask_quantile: share of rows kept per step, in (0, 1); None keeps all.
        mask_decay: of the running quantile, in [0, 1).
        collect_batch_size: samples rolled out and swept back at once; all by default.
        offload: keep latents and targets on the CPU until the loss of their rows is taken.
        gradient: how the reward's gradient is taken.
        tilt: slopes of the reward's gradient if they aren't all 1.

    Raises:
        ValueError: if a setting is out of range.
    """

    reward_scale: float
    steps: int | None = None
    cost_power: float = 2.0
    mask_quantile: float | None = 0.9
    mask_decay: float = 0.9
    collect_batch_size: int | None = None
    offload: bool = False
    gradient: GradientOptions = PLAIN
    tilt: Tilt | None = None

    def __post_init__(self) -> None:
        if self.reward_scale <= 0:
            raise ValueError(
                f"reward_scale must be > 0 (rewards are higher-is-better), got {self.reward_scale}"
            )
        if self.cost_power <= 1:
            raise ValueError(f"cost_power must be > 1, for a convex cost, got {self.cost_power}")


class DeterministicAdjointMatching(Method[MatchingBatch]):
    """Deterministic Adjoint Matching with a table without noise.

    Args:
        policy: field that is trained.
        base: field before fine-tuning.
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`, higher is better.
        transitions: `ode_euler(sigmas)`, or a function of the shared generator (a jittered grid per
            iteration).
        latents: shape, device and dtype of the latents.
        settings: reward scale, truncation, cost, mask, batch sizes.
        rollout_policy: field the trajectories follow, for instance `GuidedField(policy, 3.0)`; the
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
        transitions: Transitions | Callable[[torch.Generator], Transitions],
        *,
        latents: LatentSpec,
        settings: DeterministicSettings,
        rollout_policy: VelocityField | None = None,
        gather: Gather = gather_from_one,
    ) -> None:
        self.policy, self.base = policy, base
        self.terminal = TerminalCost(reward, settings.reward_scale, settings.gradient, settings.tilt)
        self.transitions, self.latents, self.settings = transitions, latents, settings
        self.rollout_policy, self.gather = rollout_policy, gather
        quantile = settings.mask_quantile
        self.mask = None if quantile is None else QuantileMask(quantile, settings.mask_decay)
        self.monitor = AdjointMonitor()

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """Trajectories, adjoints and targets of the samples, see `Method.collect`.

        Raises:
            ValueError: if a step adds noise, or there are fewer steps than are to be trained on.
            NonFiniteError: if a reward, gradient or adjoint is not finite.
            PhaseMemoryError: if memory runs out.
        """
        table = self.transitions(shared) if callable(self.transitions) else self.transitions
        steps = self._steps(table)
        chunks = []
        for rows in torch.arange(len(cond)).split(self.settings.collect_batch_size or len(cond)):
            ids = rows.tolist()
            chunk = self._collect_chunk(table, steps, cond.index(ids), [generators[i] for i in ids])
            chunks.append(chunk.to_cpu() if self.settings.offload else chunk)
        collected = Rows.cat(chunks)
        selected = Selected(steps, [1.0] * len(steps))
        kept = sample_rows(collected, table, selected, mask=self.mask, gather=self.gather, weight=step_length)
        samples = torch.arange(len(cond))[:, None].expand(kept.keep.shape)
        examples, masked = kept_batch(kept, samples, cond, self.gather, all_kept=self.mask is None)
        if self.settings.offload and torch.device(self.latents.device).type == "cuda":
            examples = examples.pin_memory()
        columns = everywhere(collected.stats, self.gather)
        self.terminal.update(columns["reward_gradient_norm"])
        warnings = self.monitor.update(adjoint_norms(columns))
        return Collected(examples, collected.stats["reward"], means(columns) | {"masked": masked}, warnings)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Share of the matching loss that these rows contribute, see `Method.loss`."""
        return matching.matching_loss(self.policy, example.to(self.latents.device)), {}

    def state_dict(self) -> dict[str, Any]:
        """Thresholds of the mask and of clipping, references of the adjoint norms."""
        mask = {} if self.mask is None else {"mask": self.mask.state_dict()}
        return mask | {"clip_norm": self.terminal.clip_norm, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.terminal.clip_norm = state["clip_norm"]
        self.monitor.load_state_dict(state.get("monitor", {}))
        if self.mask is not None:
            self.mask.load_state_dict(state.get("mask", {}))

    def _steps(self, table: Transitions) -> list[int]:
        """The steps that are trained on."""
        total, wanted = table.num_steps, self.settings.steps
        if table.std.any():
            raise ValueError("deterministic Adjoint Matching needs a table without noise: ode_euler(sigmas)")
        if wanted is not None and not 1 <= wanted <= total:
            raise ValueError(f"steps to train on: expected 1 .. {total} or None, got {wanted}")
        return list(range(total - (wanted or total), total))

    def _collect_chunk(
        self,
        table: Transitions,
        steps: Sequence[int],
        cond: Conditioning,
        generators: Sequence[torch.Generator],
    ) -> Rows:
        field, noise, last = self.rollout_policy or self.policy, self.latents.draw(generators), steps[-1]
        with phase("rollout", len(cond)):
            trajectory = rollout(field, table, cond, noise, lambda _: noise)
            velocity = field(*trajectory.at(last))
        final = table.mean(last, trajectory.latents[last], velocity)
        terminal = self.terminal(final, cond.prompts, lambda: self.latents.draw(generators))
        with phase("adjoint", len(cond)):
            sweep = truncated_adjoint(self.base, trajectory, final, terminal.adjoint, first=steps[0])
        known = {k: trajectory.velocities[k] for k in steps[:-1]} | {last: velocity}
        if self.rollout_policy is not None:
            known = {k: self.policy(*trajectory.at(k)) for k in steps}
        q = self.settings.cost_power
        targets = {k: sweep.velocity_base[k] - optimal_control(sweep.adjoints[k + 1], q) for k in steps}
        residuals = [matching.residual(known[k], targets[k], step_length(table, k)) for k in steps]
        return Rows(
            torch.stack([trajectory.latents[k] for k in steps], 1),
            torch.stack(list(targets.values()), 1),
            torch.stack(residuals, 1),
            self._statistics(terminal, trajectory, sweep, known),
        )

    def _statistics(
        self, terminal: Terminal, trajectory: Trajectory, sweep: AdjointSweep, known: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        """Named statistics of B samples, (B,) each; `control_cost` is that of the trained steps."""
        controls = {k: sweep.velocity_base[k] - velocity for k, velocity in known.items()}
        return {
            "reward": terminal.rewards,
            "reward_gradient_norm": terminal.gradient_norms,
            "reward_slope": terminal.slopes,
            "control_cost": control_cost(trajectory.transitions, controls, self.settings.cost_power),
            **{f"{ADJOINT_NORM}{k:02d}": a.flatten(1).norm(dim=1) for k, a in sorted(sweep.adjoints.items())},
        }
