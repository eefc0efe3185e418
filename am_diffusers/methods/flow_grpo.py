"""Flow-GRPO (Liu et al., arXiv 2505.05470): a clipped policy gradient on the steps of a stochastic table.

An iteration rolls the policy out, scores the images, and treats each step x_k -> x_{k+1} as an action of
Gaussian density (`Transitions.log_prob`). With the advantage A of the image (advantages.py), and
ratio = p_policy(x_{k+1} | x_k) / p_rollout(x_{k+1} | x_k),

    loss = mean over samples of sum over steps of
           -min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A) + kl_weight * path_kl_k

Rows are trained on in `grpo_passes` iterations before the next rollout; only from the second on the ratio
isn't 1 and the clip matters. If only `loss_steps` steps are trained, they are drawn uniformly and weighted
to stand for all. The last step is the base's and deterministic, as in the other methods here, so that the
policy acts on the image through the densities alone.

What is reached: docs/theory.md, section 9 (the tilt by reward_scale / grpo_kl_weight to first order). Sums,
not means: a log-probability is the sum over the D latent dimensions, so that the clip bounds a likelihood
ratio as in PPO (.2); the published code averages over D. Half precision moves the ratio of many dimensions
after the first pass: use float32 with several passes. The sum is written as a hinge, (1 + clip_range) *
max(A, 0) - min(...): no term is negative, so that the scaling of half-precision gradients has a size to go
by; no gradient changes. Passes a sample: K-1 policy calls, base calls at trained steps and the last one, in
an iteration with a rollout; the loss's in each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_diffusers.methods.base import Collected, Method
from am_diffusers.methods.parts import laws
from am_diffusers.methods.parts.advantages import Advantages, few_for_normalised, reward_values
from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.methods.parts.own_settings import AdvantageSettings
from am_diffusers.methods.parts.policy_rows import PolicyRows, rows_of_rank
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.step_selection import draw_steps
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.rollout import rollout
from am_diffusers.system.failures import NonFiniteError, phase
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class FlowGRPOSettings(AdvantageSettings):
    """`method: flow_grpo`.

    Attributes:
        grpo_passes: iterations that Flow-GRPO trains on the steps of one rollout; the clip acts from the
            second on.
        grpo_clip_range: how far from 1 the likelihood ratio of a step counts, in (0, 1); a ratio of sums over
            all latent dimensions, so that PPO's .2 is right, not the 1e-4 of published averages.
        grpo_kl_weight: factor of the KL of each step against the base, 0 = none; with centred advantages
            the tilt by reward_scale / grpo_kl_weight is reached to first order (docs/theory.md).
    """

    grpo_passes: int = 1
    grpo_clip_range: float = 0.2
    grpo_kl_weight: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            [
                (1 <= self.grpo_passes <= 1000, "grpo_passes", "from 1 to 1000"),
                (0 < self.grpo_clip_range < 1, "grpo_clip_range", "in (0, 1)"),
                (self.grpo_kl_weight >= 0, "grpo_kl_weight", "0 or positive"),
            ],
        )


class FlowGRPO(Method[PolicyRows]):
    """Flow-GRPO with any table whose steps all add noise except the last."""

    title, paper = "Flow-GRPO", "2505.05470"
    Settings = FlowGRPOSettings
    reads = ("num_inference_steps", "transitions", "loss_steps", "sigma_jitter")
    needs_reward_gradient = False
    compares_samples = True
    guided_everywhere = True
    decisive = ("advantages",)
    own: FlowGRPOSettings

    def __init__(self, around: Surroundings, shared: SharedSettings, own: Any = None) -> None:
        super().__init__(around, shared, own)
        self._passes = 0
        self._kept: PolicyRows | None = None

    @classmethod
    def law(cls, shared: SharedSettings, own: FlowGRPOSettings) -> str:
        """Return the tilt to first order, see `Method.law`."""
        return laws.to_first_order(shared, own.advantages, kl_weight=own.grpo_kl_weight, everywhere=True)

    @classmethod
    def cautions(cls, shared: SharedSettings, own: FlowGRPOSettings) -> list[str]:
        """Say if the group is too small for normalised advantages."""
        return few_for_normalised(own.advantages, shared.samples_per_prompt)

    @property
    def period(self) -> int:
        """Iterations from one rollout to the next."""
        return self.own.grpo_passes

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[PolicyRows]:
        """Rows of a new rollout, or those of the last one if they have passes left, see `Method.collect`.

        Rewards and their metrics are those of a new rollout: without one they are left out.

        Raises:
            ValueError: if the samples of a group don't share a prompt, a step before the last adds no
                noise, or more steps are to be trained on than do.
            NonFiniteError: if a reward is not finite.
            PhaseMemoryError: if memory runs out.
        """
        rewards, metrics = torch.empty(0), dict[str, float]()
        if self._kept is None or not self._rows_left():
            rolled = self._rollouts(cond, generators, shared)
            self._kept, self._passes = rolled.examples, 0
            rewards, metrics = rolled.rewards, rolled.metrics
        self._passes += 1
        return Collected(self._kept, rewards, metrics | {"grpo_pass": float(self._passes)})

    def loss(self, example: PolicyRows) -> tuple[Tensor, dict[str, float]]:
        """Share of the clipped loss that these rows contribute, see `Method.loss`."""
        table, cond = example.table, example.cond.index(example.samples.tolist())
        velocity = self.policy(example.latents, example.sigmas, cond)
        log_prob, path_kl = torch.zeros_like(example.log_prob), torch.zeros_like(example.log_prob)
        for k in example.steps.unique().tolist():
            rows = (example.steps == k).nonzero()[:, 0].to(velocity.device)
            new, base = velocity[rows].double(), example.velocity_base[rows].double()
            states, reached = example.latents[rows].double(), example.next_latents[rows].double()
            log_prob = log_prob.index_put((rows,), table.log_prob(k, reached, states, new))
            path_kl = path_kl.index_put((rows,), table.path_kl(k, new, base))
        # In the first pass policy and rollout are one: what differs is the rounding of other batches.
        before = log_prob.detach() if self._passes <= 1 else example.log_prob
        ratio, clip = (log_prob - before).exp(), self.own.grpo_clip_range
        advantage, weight = example.advantage.double(), example.weight.double()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        hinge = (1 + clip) * advantage.clamp(min=0) - gain
        loss = weight @ (hinge + self.own.grpo_kl_weight * path_kl)
        outside = ((ratio.detach() - 1).abs() > clip).double()
        clipped = weight @ outside / (table.num_steps - 1)  # the weights of a sample add up to K - 1
        return loss, {"path_kl": (weight @ path_kl.detach()).item(), "clipped": clipped.item()}

    def state_dict(self) -> dict[str, Any]:
        """Return how many passes the rows have had."""
        return {"passes": self._passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._passes = state["passes"]

    def local_state_dict(self) -> dict[str, Any]:
        """Return the rows, if they have passes left."""
        if self._kept is None or not self._rows_left():
            return {}
        return {"examples": self._kept.state_dict()}

    def load_local_state_dicts(self, states: Sequence[dict[str, Any]], share: PartShare) -> None:
        """Restores this rank's share of the rows; without any, the next iteration rolls out."""
        self._kept = None
        if all(states) and states:
            parts = [state["examples"] for state in states]
            self._kept = rows_of_rank(parts, share, self.latents.device)

    def snapshot(self) -> Callable[[Exception | None], None]:
        """Return a roll-back that also drops rows of a pass that wasn't finite: they would fail again."""
        restore = super().snapshot()

        def roll_back(error: Exception | None) -> None:
            restore(error)
            if isinstance(error, NonFiniteError):
                self._kept = None

        return roll_back

    def _rows_left(self) -> bool:
        """Tell if the rows have passes left; rows without any pass are of an iteration that failed."""
        return 0 < self._passes < self.own.grpo_passes

    def _rollouts(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[PolicyRows]:
        flags = self.shared
        table = self.around.table(
            flags.transitions, flags.num_inference_steps, jitter=flags.sigma_jitter, generator=shared
        )
        steps = draw_steps(table, flags.loss_steps, shared)
        parts = []
        for rows in torch.arange(len(cond)).split(self.sizes.rollout or len(cond)):
            ids = rows.tolist()
            parts.append(self._steps(table, steps, cond.index(ids), [generators[i] for i in ids]))
        states, reached, base, log_prob, final = (torch.cat(column) for column in zip(*parts, strict=True))
        rewards = reward_values(self.around.reward, final, cond.prompts, batch_size=self.sizes.reward)
        compare = Advantages(flags.scale, flags.samples_per_prompt, self.own.advantages)
        advantages = compare(rewards, cond.prompts)
        everywhere = self.gather(torch.stack([rewards, advantages], 1).flatten()).reshape(-1, 2)
        share = (table.num_steps - 1) / len(steps) / len(everywhere)
        examples = PolicyRows(
            *(part.flatten(0, 1) for part in (states, reached, base)),
            steps=torch.tensor(steps).repeat(len(cond)),
            log_prob=log_prob.flatten(),
            advantage=advantages.repeat_interleave(len(steps)),
            weight=rewards.new_full((len(cond) * len(steps),), share),
            samples=torch.arange(len(cond)).repeat_interleave(len(steps)),
            cond=cond,
            table=table,
        )
        metrics = {
            "reward": everywhere[:, 0].mean().item(),
            "reward_std": everywhere[:, 0].std(correction=0).item(),
            "advantage_std": everywhere[:, 1].std(correction=0).item(),
        }
        return Collected(examples, rewards, metrics)

    def _steps(
        self,
        table: Transitions,
        steps: Sequence[int],
        cond: Conditioning,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, ...]:
        """States, next states, base velocities (b, S, ...), log densities (b, S), final latents (b, ...)."""
        noise, last = self.latents.draw(generators), table.num_steps - 1
        with phase("rollout", len(cond)):
            path = rollout(self.policy, table, cond, noise, lambda _: self.latents.draw(generators))
            base = [self.base(*path.at(k)) for k in steps]
            final = table.mean(last, path.latents[last], self.base(*path.at(last)))
        index = torch.tensor(steps)
        states, reached = path.latents[index], path.latents[index + 1]
        log_prob = [
            table.log_prob(k, after.double(), x.double(), path.velocities[k].double())
            for k, x, after in zip(steps, states, reached, strict=True)
        ]
        columns = states, reached, torch.stack(base), torch.stack(log_prob)
        return (*(column.transpose(0, 1) for column in columns), final)
