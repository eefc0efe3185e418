"""Adjoint Matching (Domingo-Enrich et al., arXiv 2409.08861, section 5).

Samples p*(clean) ~ p_base(clean) * exp(reward_scale * reward(clean)) after training. An iteration rolls
the policy out with a memoryless table, sweeps the adjoint back along the trajectories under the base and
regresses the policy's velocity on the targets of matching.py. Passes through the network: K-1 policy
calls, K-1 base vjps, one base call at step 0 if that step is selected, and the regression's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.adjoint import AdjointSweep, StateCost, full_adjoint, lean_adjoint
from am_diffusers.divergences import Tilt
from am_diffusers.matching import MatchingBatch, Pairing, QuantileMask
from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.parts.reports import AdjointMonitor, adjoint_norms, everywhere, means, statistics
from am_diffusers.methods.parts.rows import Rows, Swept, kept_batch, sample_rows
from am_diffusers.methods.parts.step_selection import Selection, StepSelection
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import Trajectory, rollout
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import PLAIN, GradientOptions, RewardOfLatents, Terminal, TerminalCost
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True)
class AdjointMatchingSettings:
    """Choices of Adjoint Matching.

    Attributes:
        reward_scale: lambda of the tilt exp(lambda * reward), > 0.
        pairing: which adjoint belongs to a step; `left` is the published code's.
        adjoint: `lean`, or `full` for study (same optimum, more noise, more passes).
        steps: number of steps a sample is trained on (published: K/2), or "all".
        step_selection: which ones, see step_selection.py; published: the last 25 % and as many others.
        mask_quantile: share of rows kept per step, in (0, 1); None keeps all and is the only unbiased
            choice: on a mixture of three modes .9 reaches 40 % of the tilt's KL, None 92 %.
        mask_decay: of the running quantile, in [0, 1).
        collect_batch_size: samples rolled out and swept back at once; all by default.
        offload: keep latents and targets on the CPU until the loss of their rows is taken.
        gradient: how the reward's gradient is taken.
        tilt: the law aimed at, if it isn't p_base * exp(reward_scale * reward).
        state_cost: running cost of the states along a trajectory, see adjoint.py; None = 0.

    Raises:
        ValueError: if a setting is out of range.
    """

    reward_scale: float
    pairing: Pairing = "right"
    adjoint: Literal["lean", "full"] = "lean"
    steps: int | Literal["all"] = "all"
    step_selection: Selection = "last_and_random"
    mask_quantile: float | None = 0.9
    mask_decay: float = 0.9
    collect_batch_size: int | None = None
    offload: bool = False
    gradient: GradientOptions = PLAIN
    tilt: Tilt | None = None
    state_cost: StateCost | None = None

    def __post_init__(self) -> None:
        if self.reward_scale <= 0:
            raise ValueError(
                f"reward_scale must be > 0 (rewards are higher-is-better), got {self.reward_scale}"
            )
        if self.pairing not in ("right", "left", "trapezoid"):
            raise ValueError(f"pairing must be right, left or trapezoid, got {self.pairing!r}")
        if self.adjoint not in ("lean", "full"):
            raise ValueError(f"adjoint must be lean or full, got {self.adjoint!r}")


class AdjointMatching(Method[MatchingBatch]):
    """Adjoint Matching with any table whose steps all add noise except the last.

    Args:
        policy: field that is trained.
        base: field before fine-tuning.
        reward: differentiable `(latents (b, ...), prompts) -> (b,)`, higher is better.
        transitions: the table, or a function of the shared generator (a jittered grid per iteration).
        latents: shape, device and dtype of the latents.
        settings: reward scale, pairing, selection of steps, mask, batch sizes.
        rollout_policy: field the trajectories follow, for instance `GuidedField(policy, 3.0)`; the
            policy itself by default.
        gather: concatenates a 1-D tensor over ranks; a single process by default.

    Raises:
        ValueError: if the full adjoint is combined with another rollout policy.
    """

    needs_reward_gradient = True

    def __init__(
        self,
        policy: VelocityField,
        base: VelocityField,
        reward: RewardOfLatents,
        transitions: Transitions | Callable[[torch.Generator], Transitions],
        *,
        latents: LatentSpec,
        settings: AdjointMatchingSettings,
        rollout_policy: VelocityField | None = None,
        gather: Gather = gather_from_one,
    ) -> None:
        if settings.adjoint == "full" and rollout_policy is not None:
            raise ValueError("adjoint='full' differentiates the rollout: use it without a rollout_policy")
        self.policy, self.base = policy, base
        self.terminal = TerminalCost(reward, settings.reward_scale, settings.gradient, settings.tilt)
        self.transitions, self.latents, self.settings = transitions, latents, settings
        self.rollout_policy, self.gather = rollout_policy, gather
        quantile = settings.mask_quantile
        self.mask = None if quantile is None else QuantileMask(quantile, settings.mask_decay)
        self.selection = StepSelection(settings.steps, settings.step_selection)
        self.monitor = AdjointMonitor()

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """Trajectories, adjoints and targets of the samples, see `Method.collect`.

        Raises:
            ValueError: if a step before the last adds no noise, or more steps are to be trained on than do.
            NonFiniteError: if a reward, gradient or adjoint is not finite.
            PhaseMemoryError: if memory runs out.
        """
        swept = self.sweep(cond, generators, shared)
        samples = torch.arange(len(cond))[:, None].expand(swept.rows.keep.shape)
        examples, masked = kept_batch(swept.rows, samples, cond, self.gather, all_kept=self.mask is None)
        if self.settings.offload and torch.device(self.latents.device).type == "cuda":
            examples = examples.pin_memory()
        return Collected(examples, swept.rewards, swept.metrics | {"masked": masked}, swept.warnings)

    @torch.no_grad()
    def sweep(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Swept:
        """Trajectories of this rank's samples with adjoints and targets; raises as `collect`."""
        table = self.transitions(shared) if callable(self.transitions) else self.transitions
        selected = self.selection.select(table, shared)
        chunks = []
        for rows in torch.arange(len(cond)).split(self.settings.collect_batch_size or len(cond)):
            ids = rows.tolist()
            chunk = self._collect_chunk(table, selected.steps, cond.index(ids), [generators[i] for i in ids])
            chunks.append(chunk.to_cpu() if self.settings.offload else chunk)
        collected = Rows.cat(chunks)
        metrics, warnings = self._metrics(collected.stats)
        rows = sample_rows(
            collected, table, selected, mask=self.mask, selection=self.selection, gather=self.gather
        )
        return Swept(rows, collected.stats["reward"], metrics, warnings)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Share of the matching loss that these rows contribute, see `Method.loss`."""
        return matching.matching_loss(self.policy, example.to(self.latents.device)), {}

    def state_dict(self) -> dict[str, Any]:
        """Thresholds of the mask and of clipping, sizes of the steps, references of the adjoint norms."""
        mask = {} if self.mask is None else {"mask": self.mask.state_dict()}
        own = {"selection": self.selection.state_dict(), "monitor": self.monitor.state_dict()}
        return mask | own | {"clip_norm": self.terminal.clip_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.terminal.clip_norm = state["clip_norm"]
        self.selection.load_state_dict(state.get("selection", {}))
        self.monitor.load_state_dict(state.get("monitor", {}))
        if self.mask is not None:
            self.mask.load_state_dict(state.get("mask", {}))

    def _collect_chunk(
        self,
        table: Transitions,
        steps: Sequence[int],
        cond: Conditioning,
        generators: Sequence[torch.Generator],
    ) -> Rows:
        policy, noise = self.rollout_policy or self.policy, self.latents.draw(generators)
        with phase("rollout", len(cond)):
            trajectory = rollout(policy, table, cond, noise, lambda _: self.latents.draw(generators))
        with phase("adjoint", len(cond)):
            terminal, sweep = self._sweep(trajectory, generators, with_first=0 in steps)
        targets = {
            k: matching.matching_target(
                table,
                k,
                velocity_base=sweep.velocity_base[k],
                adjoint_right=sweep.adjoints[k + 1],
                adjoint_left=sweep.adjoints.get(k),
                pairing=self.settings.pairing,
            )
            for k in steps
        }
        residuals = [
            matching.residual(
                self._policy_velocity(trajectory, k), target, matching.matching_weight(table, k)
            )
            for k, target in targets.items()
        ]
        latents = torch.stack([trajectory.latents[k] for k in steps], 1)
        stats = statistics(terminal, trajectory, sweep)
        return Rows(latents, torch.stack(list(targets.values()), 1), torch.stack(residuals, 1), stats)

    def _sweep(
        self, trajectory: Trajectory, generators: Sequence[torch.Generator], *, with_first: bool
    ) -> tuple[Terminal, AdjointSweep]:
        """The trajectory's rewards and their gradients, and the adjoints."""
        found: list[Terminal] = []

        def terminal(final: Tensor) -> Tensor:
            prompts = trajectory.cond.prompts
            found.append(self.terminal(final, prompts, lambda: self.latents.draw(generators)))
            return found[0].adjoint

        full = self.settings.adjoint == "full"
        run = partial(full_adjoint, self.base, self.policy) if full else partial(lean_adjoint, self.base)
        sweep = run(trajectory, terminal, with_first=with_first, state_cost=self.settings.state_cost)
        return found[0], sweep

    def _policy_velocity(self, trajectory: Trajectory, k: int) -> Tensor:
        """The trained policy's velocity at x_k: known from the rollout if that followed it."""
        return trajectory.velocities[k] if self.rollout_policy is None else self.policy(*trajectory.at(k))

    def _metrics(self, stats: dict[str, Tensor]) -> tuple[dict[str, float], list[str]]:
        """Means of the statistics over the samples of all ranks, and what the monitor says of them."""
        columns = everywhere(stats, self.gather)
        self.terminal.update(columns["reward_gradient_norm"])
        return means(columns), self.monitor.update(adjoint_norms(columns))
