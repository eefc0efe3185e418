"""Reinforce Adjoint Matching (Bergmeister et al., arXiv 2605.10759, equation 17): values, no reward gradient.

An iteration makes clean images with the current policy by any sampler, scores them, and puts them back at
noise levels sigma in (0, 1], several for each, where

    x = (1 - sigma) * clean + sigma * noise
    target = velocity_base(x) + A * ((noise - clean) - velocity_old(x))
    loss   = mean of |velocity_policy(x) - target|^2        (sum over latent dims)

with `velocity_old` the policy before the update and A the advantage of the image (advantages.py). The
target's mean is the tilt's velocity to first order in reward_scale; keep reward_scale * std(reward) well
below 1, it diverges where advantages deviate more (docs/theory.md, section 9). Deviations from the paper:
noise levels are stratified and uniform; the path-cost correction of its section 5 is not offered. Passes a
sample: K calls of the policy, and for each noise level one of the policy and one of the base without
gradient, and the regression's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.methods.parts import laws
from am_diffusers.methods.parts.advantages import Advantages, few_for_normalised, reward_values
from am_diffusers.methods.parts.end_points import EndPointSettings, draw_images
from am_diffusers.methods.parts.matching_method import MatchingMethod
from am_diffusers.methods.parts.own_settings import AdvantageSettings
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.reports import means
from am_diffusers.methods.parts.rows import Chunk, Rows
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.parametrization import interpolate
from am_diffusers.system.failures import phase
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class RAMSettings(AdvantageSettings, EndPointSettings):
    """`method: ram`.

    Attributes:
        ram_noises: noise levels that RAM puts each image back to.
    """

    ram_noises: int = 4

    def __post_init__(self) -> None:
        require(self, [(1 <= self.ram_noises <= 1000, "ram_noises", "from 1 to 1000")])


class Scored(NamedTuple):
    """Images of an iteration: clean latents (B, ...), rewards (B,) and advantages (B,)."""

    clean: Tensor
    rewards: Tensor
    advantages: Tensor


class RAM(MatchingMethod[Scored]):
    """Reinforce Adjoint Matching."""

    title, paper = "Reinforce Adjoint Matching", "2605.10759"
    Settings = RAMSettings
    reads = ("num_inference_steps",)
    needs_reward_gradient = False
    compares_samples = True
    decisive = ("advantages",)
    own: RAMSettings

    @classmethod
    def law(cls, shared: SharedSettings, own: RAMSettings) -> str:
        """Return the tilt to first order, see `Method.law`."""
        return laws.to_first_order(shared, own.advantages)

    @classmethod
    def cautions(cls, shared: SharedSettings, own: RAMSettings) -> list[str]:
        """Say if the group is too small for normalised advantages."""
        return few_for_normalised(own.advantages, shared.samples_per_prompt)

    def prepare(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Scored:
        """Return images of the current policy with their advantages.

        Raises:
            ValueError: if the samples of a group don't share a prompt.
        """
        clean = draw_images(self, self.around.rollout or self.policy, cond, generators)
        rewards = reward_values(self.around.reward, clean, cond.prompts, batch_size=self.sizes.reward)
        compare = Advantages(self.shared.scale, self.shared.samples_per_prompt, self.own.advantages)
        return Scored(clean, rewards, compare(rewards, cond.prompts))

    def chunk(
        self, common: Scored, ids: list[int], cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Chunk:
        """Return the images put back to noise, with targets, see `MatchingMethod.chunk`."""
        clean, rewards, advantages = (column[ids] for column in common)
        number, spread, parts = self.own.ram_noises, advantages.view(-1, *[1] * (clean.ndim - 1)), []
        for j in range(number):
            noise = self.latents.draw(generators)
            uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
            sigma = ((j + 1 - uniform) / number).to(clean)  # one in each of as many equal parts of (0, 1]
            x = interpolate(clean, noise, sigma)
            with phase("rollout", len(cond)):
                old, base = self.policy(x, sigma, cond), self.base(x, sigma, cond)
            target = base + spread * ((noise - clean) - old)
            parts.append((x, target, sigma, (old - base).flatten(1).square().sum(1)))
        x, target, sigmas, shifts = (torch.stack(column, 1) for column in zip(*parts, strict=True))
        ones = torch.ones_like(sigmas)
        stats = {"reward": rewards, "advantage": advantages, "velocity_shift": shifts.mean(1)}
        return Chunk(Rows(x, target, sigmas, ones, ones), stats)

    def report(self, columns: dict[str, Tensor]) -> tuple[dict[str, float], Sequence[str]]:
        """Return numbers to log: of advantages their spread, as their mean is 0."""
        spread = columns.pop("advantage").std(correction=0).item()
        return means(columns) | {"advantage_std": spread}, ()
