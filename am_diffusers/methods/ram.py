"""Reinforce Adjoint Matching (Bergmeister et al., arXiv 2605.10759, equation 17): values, no reward gradient.

An iteration makes clean pictures with the current policy by any sampler, scores them, and puts them back at
noise levels sigma in (0, 1], several for each, where

    x = (1 - sigma) * clean + sigma * noise
    target = velocity_base(x) + A * ((noise - clean) - velocity_old(x))
    loss   = mean of |velocity_policy(x) - target|^2        (sum over latent dims)

with `velocity_old` the policy before the update and A the advantage of the picture (values.py). Why: the
optimal velocity is velocity_base - sigma / (1 - sigma) * grad V(x), V(x) the value. Leaving out what the
path costs, V(x) is reward_scale * E[r | x], whose gradient needs no gradient of r (REINFORCE):

    grad E[r | x] = Cov(r, grad log p(clean | x)),
    grad log p(clean | x) = (1 - sigma) / sigma * (velocity(x) - (noise - clean)).

So with centred advantages the target's mean is velocity_base(x) + reward_scale * Cov(r, noise - clean | x),
the tilt's to first order in reward_scale.

Fixed point and bias (derived here). The tilt's own shift is the integral of Cov_l(r, noise - clean | x)
over all scales l from 0 to reward_scale, Cov_l under the tilt by l; RAM takes the integrand at its upper
end, under the law it has reached. Where the covariance doesn't depend on l there is no bias: Gaussian data
and a linear reward. With r = -curvature / 2 * |clean - best|^2 on Gaussian data the posterior mean obeys

    mean = mean_base - reward_scale * curvature * variance * (mean - best)

with the tuned posterior variance where the tilt has the base's, which is larger: the reward pulls too
weakly, by an error of the order reward_scale^2 (log-log slope 2 for weak tilts, less where they saturate).
That fixed point isn't the velocity of one law at all sigmas, and the mismatch of velocity_old with the
velocity of its own pictures comes back times A: it grows, and the iteration diverges, once the advantages a
state leaves open deviate too much. In docs/methods.md it diverges with a linear reward of deviation .95, not
with quadratic ones of .8 and .65; in the benchmark of pictures not with normalised advantages (deviation 1)
and reward_scale 1. Strong tilts are out of reach: keep reward_scale * std(reward) well below 1 for a reward
without bound.

Deviations from the paper: noise levels are stratified and uniform; advantages are centred, which keeps
`reward_scale` the factor of the tilt (`normalised` divides by the deviation of a prompt's rewards); the
path-cost correction of its section 5 is not offered. Passes a sample: K calls of the policy, and for each
noise level one of the policy and one of the base without gradient, and the regression's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_diffusers import matching
from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.base import Collected, Gather, Method, gather_from_one
from am_diffusers.methods.parts.advantages import Advantages, reward_values
from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import sample
from am_diffusers.system.failures import phase
from am_diffusers.terminal_cost import RewardOfLatents
from am_diffusers.transitions import Transitions
from am_diffusers.velocity import Conditioning, VelocityField, interpolate


@dataclass(frozen=True)
class RAMSettings:
    """Choices of RAM.

    Attributes:
        advantages: how rewards of a prompt are compared.
        noises: noise levels that a picture is put back to, at least 1.
        collect_batch_size: samples of a transformer call; all by default.
        reward_batch_size: samples scored at once; all by default.

    Raises:
        ValueError: if `noises` is out of range.
    """

    advantages: Advantages
    noises: int = 4
    collect_batch_size: int | None = None
    reward_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.noises < 1:
            raise ValueError(f"a picture is put back to at least 1 noise level, got noises={self.noises}")


class RAM(Method[MatchingBatch]):
    """Reinforce Adjoint Matching.

    Args:
        policy: field that is trained.
        base: field before fine-tuning.
        reward: `(latents (b, ...), prompts) -> (b,)`, higher is better; called without gradient.
        transitions: table that makes the clean pictures, of any kind.
        latents: shape, device and dtype of the latents.
        settings: advantages, noise levels, batch sizes.
        rollout_policy: field the pictures are made with, for instance `GuidedField(policy, 3.0)` (then
            they aren't the policy's law, and what is aimed at isn't the tilt); the policy by default.
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
        transitions: Transitions,
        *,
        latents: LatentSpec,
        settings: RAMSettings,
        rollout_policy: VelocityField | None = None,
        gather: Gather = gather_from_one,
    ) -> None:
        self.policy, self.base, self.reward, self.transitions = policy, base, reward, transitions
        self.latents, self.settings, self.gather = latents, settings, gather
        self.rollout_policy = policy if rollout_policy is None else rollout_policy

    @torch.no_grad()
    def collect(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Collected[MatchingBatch]:
        """Pictures, their advantages and the targets around them, see `Method.collect`.

        Raises:
            ValueError: if the samples of a group don't share a prompt.
            NonFiniteError: if a reward is not finite.
            PhaseMemoryError: if memory runs out.
        """
        chunks = torch.arange(len(cond)).split(self.settings.collect_batch_size or len(cond))
        clean = torch.cat([self._pictures(cond.index(c.tolist()), _some(generators, c)) for c in chunks])
        rewards = reward_values(self.reward, clean, cond.prompts, batch_size=self.settings.reward_batch_size)
        advantages = self.settings.advantages(rewards, cond.prompts)
        parts = [
            self._rows(clean[c], advantages[c], cond.index(c.tolist()), _some(generators, c)) for c in chunks
        ]
        x, sigmas, target, shifts = (torch.cat(column) for column in zip(*parts, strict=True))
        columns = torch.stack([rewards, advantages, shifts.view(len(cond), -1).mean(1)], 1)
        everywhere = self.gather(columns.flatten()).reshape(-1, 3)
        number, rewards_everywhere = len(everywhere) * self.settings.noises, everywhere[:, 0]
        examples = MatchingBatch(
            latents=x,
            sigmas=sigmas,
            target=target,
            weight=torch.full_like(sigmas, 1 / number),
            samples=torch.arange(len(cond)).repeat_interleave(self.settings.noises),
            cond=cond,
        )
        metrics = {
            "reward": rewards_everywhere.mean().item(),
            "reward_std": rewards_everywhere.std(correction=0).item(),
            "advantage_std": everywhere[:, 1].std(correction=0).item(),
            "velocity_shift": everywhere[:, 2].mean().item(),
        }
        return Collected(examples, rewards, metrics)

    def loss(self, example: MatchingBatch) -> tuple[Tensor, dict[str, float]]:
        """Share of the matching loss that these rows contribute, see `Method.loss`."""
        return matching.matching_loss(self.policy, example), {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all there is are the weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _pictures(self, cond: Conditioning, generators: Sequence[torch.Generator]) -> Tensor:
        """Clean latents of the current policy, (B, ...)."""
        noise = self.latents.draw(generators)
        with phase("rollout", len(cond)):
            return sample(
                self.rollout_policy,
                self.transitions,
                cond,
                noise,
                lambda _: self.latents.draw(generators),
            )

    def _rows(
        self, clean: Tensor, advantages: Tensor, cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, noise levels, targets and squared distances of policy and base; sample-major rows."""
        number, spread = self.settings.noises, advantages.view(-1, *[1] * (clean.ndim - 1))
        parts = []
        for j in range(number):
            noise = self.latents.draw(generators)
            uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
            sigma = ((j + 1 - uniform) / number).to(clean)  # one in each of so many equal parts of (0, 1]
            x = interpolate(clean, noise, sigma)
            with phase("rollout", len(cond)):
                old, base = self.policy(x, sigma, cond), self.base(x, sigma, cond)
            target = base + spread * ((noise - clean) - old)
            parts.append((x, sigma, target, (old - base).flatten(1).square().sum(1)))
        x, sigmas, target, shifts = (torch.stack(column, 1) for column in zip(*parts, strict=True))
        return x.flatten(0, 1), sigmas.flatten(), target.flatten(0, 1), shifts.flatten()


def _some(generators: Sequence[torch.Generator], rows: Tensor) -> list[torch.Generator]:
    return [generators[i] for i in rows.tolist()]
