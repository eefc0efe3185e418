"""Adjoint Matching (Domingo-Enrich et al., arXiv 2409.08861, section 5).

Samples p*(clean) ~ p_base(clean) * exp(reward_scale * reward(clean)) after training. An iteration rolls
the policy out with a memoryless table, sweeps the adjoint back along the trajectories under the base and
regresses the policy's velocity on the targets of matching.py. Passes through the network: K-1 policy
calls, K-1 base vjps, one base call at step 0 if that step is selected, and the regression's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers import adjoint, matching
from am_diffusers.divergences import Tilt
from am_diffusers.matching import MatchingBatch, Pairing, QuantileMask
from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.rows import Rows, masked_batch
from am_diffusers.methods.statistics import mean_statistics, statistics
from am_diffusers.out_of_memory import phase
from am_diffusers.rollout import LatentSpec, Trajectory, rollout
from am_diffusers.terminal import PLAIN, GradientOptions, RewardOfLatents, Terminal, TerminalCost
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True)
class AdjointMatchingSettings:
    """Choices of Adjoint Matching.

    Attributes:
        reward_scale: lambda of the tilt exp(lambda * reward), > 0.
        pairing: which adjoint belongs to a step; `left` is the published code's.
        adjoint: `lean`, or `full` for study (same optimum, more noise, more passes).
        steps: number of steps a sample is trained on: half of them the last ones with noise, the others
            drawn uniformly from the rest (published: K/2, the last 25 % and as many others); or "all".
        mask_quantile: share of rows kept per step, in (0, 1); None keeps all and is the only unbiased
            choice: on a mixture of three modes .9 reaches 40 % of the tilt's KL, None 92 %.
        mask_decay: of the running quantile, in [0, 1).
        collect_batch_size: samples rolled out and swept back at once; all by default.
        offload: keep latents and targets on the CPU until the loss of their rows is taken.
        gradient: how the reward's gradient is taken.
        tilt: the law aimed at, if it isn't p_base * exp(reward_scale * reward).

    Raises:
        ValueError: if a setting is out of range.
    """

    reward_scale: float
    pairing: Pairing = "right"
    adjoint: Literal["lean", "full"] = "lean"
    steps: int | Literal["all"] = "all"
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
        table = self.transitions(shared) if callable(self.transitions) else self.transitions
        steps = matching.select_steps(table, self.settings.steps, shared)
        chunks = []
        for rows in torch.arange(len(cond)).split(self.settings.collect_batch_size or len(cond)):
            ids = rows.tolist()
            chunk = self._collect_chunk(table, steps, cond.index(ids), [generators[i] for i in ids])
            chunks.append(chunk.to_cpu() if self.settings.offload else chunk)
        collected = Rows.cat(chunks)
        examples, masked = masked_batch(collected, table, steps, cond, self.mask, self.gather)
        if self.settings.offload and torch.device(self.latents.device).type == "cuda":
            examples = examples.pin_memory()
        metrics = self._metrics(collected.stats) | {"masked": masked}
        return Collected(examples, collected.stats["reward"], metrics)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Share of the matching loss that these rows contribute, see `Method.loss`."""
        return matching.matching_loss(self.policy, example.to(self.latents.device)), {}

    def state_dict(self) -> dict[str, Any]:
        """Thresholds of the mask and of clipping."""
        mask = {} if self.mask is None else {"mask": self.mask.state_dict()}
        return mask | {"clip_norm": self.terminal.clip_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.terminal.clip_norm = state["clip_norm"]
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
    ) -> tuple[Terminal, adjoint.AdjointSweep]:
        """The trajectory's rewards and their gradients, and the adjoints."""
        found: list[Terminal] = []

        def terminal(final: Tensor) -> Tensor:
            prompts = trajectory.cond.prompts
            found.append(self.terminal(final, prompts, lambda: self.latents.draw(generators)))
            return found[0].adjoint

        if self.settings.adjoint == "lean":
            sweep = adjoint.lean_adjoint(self.base, trajectory, terminal, with_first=with_first)
        else:
            sweep = adjoint.full_adjoint(self.base, self.policy, trajectory, terminal, with_first=with_first)
        return found[0], sweep

    def _policy_velocity(self, trajectory: Trajectory, k: int) -> Tensor:
        """The trained policy's velocity at x_k: known from the rollout if that followed it."""
        return trajectory.velocities[k] if self.rollout_policy is None else self.policy(*trajectory.at(k))

    def _metrics(self, stats: dict[str, Tensor]) -> dict[str, float]:
        """Means of the statistics over the samples of all ranks."""
        means, columns = mean_statistics(stats, self.gather)
        self.terminal.update(columns["reward_gradient_norm"])
        return means
