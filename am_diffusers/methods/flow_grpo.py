"""Flow-GRPO (Liu et al., arXiv 2505.05470): a clipped policy gradient on the steps of a stochastic table.

An iteration rolls the policy out, scores the pictures, and treats each step x_k -> x_{k+1} as an action of
Gaussian density (`Transitions.log_prob`). With the advantage A of the picture (values.py), and
ratio = p_policy(x_{k+1} | x_k) / p_rollout(x_{k+1} | x_k),

    loss = mean over samples of sum over steps of
           -min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A) + kl_weight * path_kl_k

Rows are trained on in `passes` iterations before the next rollout; only from the second on the ratio isn't 1
and the clip matters. If only `steps` steps are trained, they are drawn uniformly and weighted to stand for
all. The last step is the base's and deterministic, as in the other methods here, so that the policy acts on
the picture through the densities alone.

What is reached, with centred advantages and no guidance (docs/theory.md, section 9): as published, the KL
is differentiated at the states visited, not through which states are. A step is weighed against the reward
it leads to and not against the KL of later steps. So learning rests half-way, in velocities, from the base
to the tilt exp(2 l r), l = reward_scale / kl_weight: the tilt by l to first order in l.

Sums, not means. A log-probability here is the sum over the D latent dimensions, so that `ratio` is the
likelihood ratio and the clip a bound on it, as in PPO (.2). The published code averages over dimensions: its
log-ratio is ours / D, and its clip ranges of 1e-4 and 1e-5 correspond to 6.6 and .66 in the logarithm of
ours for a picture of 512 pixels (D = 65536), its beta (.01 to .04) to beta / D on our `path_kl`.
In half precision rollout and loss agree on a velocity to its rounding only, which moves the ratio of many
dimensions after the first pass: use float32 with `passes` > 1. Deviations: the table is this package's
(memoryless, without a noise_level); no advantage clipping; start noise is each picture's own.

The sum is written as a hinge, (1 + clip_range) * max(A, 0) - min(...): no term is negative, so that losses
don't cancel and the trainer's scaling of half-precision gradients has a size to go by. No gradient changes.
Passes a sample: K-1 calls of the policy and, at trained steps and the last one, of the base in an iteration
with a rollout, and the loss's own in each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from am_diffusers.methods.base import Collected, Gather, Method, PartShare, gather_from_one
from am_diffusers.methods.parts.advantages import Advantages, reward_values
from am_diffusers.methods.parts.policy_rows import PolicyRows, rows_of_rank
from am_diffusers.methods.parts.step_selection import draw_steps
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import rollout
from am_diffusers.system.failures import NonFiniteError, phase
from am_diffusers.terminal_cost import RewardOfLatents
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField


@dataclass(frozen=True)
class FlowGRPOSettings:
    """Choices of Flow-GRPO.

    Attributes:
        advantages: how rewards of a prompt are compared.
        passes: iterations on the rows of a rollout, at least 1.
        clip_range: the likelihood ratio of a step counts up to so much above or below 1, in (0, 1).
        kl_weight: factor of the KL of a step against the base, >= 0.
        steps: number of steps a sample is trained on, or "all" (K - 1).
        collect_batch_size: samples rolled out at once; all by default.
        reward_batch_size: samples scored at once; all by default.

    Raises:
        ValueError: if a setting is out of range.
    """

    advantages: Advantages
    passes: int = 1
    clip_range: float = 0.2
    kl_weight: float = 1.0
    steps: int | Literal["all"] = "all"
    collect_batch_size: int | None = None
    reward_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.passes < 1 or not 0 < self.clip_range < 1 or self.kl_weight < 0:
            raise ValueError(
                "expected passes >= 1, 0 < clip_range < 1 and kl_weight >= 0, got "
                f"{self.passes}, {self.clip_range} and {self.kl_weight}"
            )


class FlowGRPO(Method[PolicyRows]):
    """Flow-GRPO with any table whose steps all add noise except the last.

    Args:
        policy: field that is trained and followed, for instance a `GuidedField`.
        base: the same before fine-tuning.
        reward: `(latents (b, ...), prompts) -> (b,)`, higher is better; called without gradient.
        transitions: the table, or a function of the shared generator (a jittered grid per rollout).
        latents: shape, device and dtype of the latents.
        settings: advantages, passes, clip, KL, steps, batch sizes.
        gather: concatenates a 1-D tensor over ranks; a single process by default.
    """

    needs_reward_gradient = False
    compares_samples = True
    aims_at_tilt = False

    def __init__(
        self,
        policy: VelocityField,
        base: VelocityField,
        reward: RewardOfLatents,
        transitions: Transitions | Callable[[torch.Generator], Transitions],
        *,
        latents: LatentSpec,
        settings: FlowGRPOSettings,
        gather: Gather = gather_from_one,
    ) -> None:
        self.policy, self.base, self.reward, self.transitions = policy, base, reward, transitions
        self.latents, self.settings, self.gather = latents, settings, gather
        self._passes = 0
        self._kept: PolicyRows | None = None

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
        ratio, clip = (log_prob - before).exp(), self.settings.clip_range
        advantage, weight = example.advantage.double(), example.weight.double()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        hinge = (1 + clip) * advantage.clamp(min=0) - gain
        loss = weight @ (hinge + self.settings.kl_weight * path_kl)
        outside = ((ratio.detach() - 1).abs() > clip).double()
        clipped = weight @ outside / (table.num_steps - 1)  # the weights of a sample add up to K - 1
        return loss, {"path_kl": (weight @ path_kl.detach()).item(), "clipped": clipped.item()}

    def state_dict(self) -> dict[str, Any]:
        """How many passes the rows have had."""
        return {"passes": self._passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._passes = state["passes"]

    def local_state_dict(self) -> dict[str, Any]:
        """The rows, if they have passes left."""
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
        """As `Method.snapshot`, but rows of a pass that wasn't finite are dropped: they would fail again."""
        restore = super().snapshot()

        def roll_back(error: Exception | None) -> None:
            restore(error)
            if isinstance(error, NonFiniteError):
                self._kept = None

        return roll_back

    def _rows_left(self) -> bool:
        """Whether the rows have passes left; rows without any pass are of an iteration that failed."""
        return 0 < self._passes < self.settings.passes

    def _rollouts(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[PolicyRows]:
        table = self.transitions(shared) if callable(self.transitions) else self.transitions
        steps = draw_steps(table, self.settings.steps, shared)
        parts = []
        for rows in torch.arange(len(cond)).split(self.settings.collect_batch_size or len(cond)):
            ids = rows.tolist()
            parts.append(self._steps(table, steps, cond.index(ids), [generators[i] for i in ids]))
        states, reached, base, log_prob, final = (torch.cat(column) for column in zip(*parts, strict=True))
        rewards = reward_values(self.reward, final, cond.prompts, batch_size=self.settings.reward_batch_size)
        advantages = self.settings.advantages(rewards, cond.prompts)
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
