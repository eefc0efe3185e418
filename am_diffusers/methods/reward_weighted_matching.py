"""Reward-weighted flow matching on images of the base: values of the reward, no gradient, no chain.

Flow matching on images that are weighed by exp(reward_scale * reward) learns the velocity of the tilt, at
every noise level, whatever the number of steps. An iteration makes G clean images of each prompt with the
base, by any sampler, weighs each against its group, and puts it back at noise levels sigma in (0, 1]:

    w      = exp(reward_scale * reward) / mean of the group's
    x      = (1 - sigma) * clean + sigma * noise
    n      = noise - clean - velocity_base(x)                     its mean given x is 0
    u      = velocity_policy(x) - velocity_base(x)
    loss   = c(sigma) * (w |u|^2 - 2 (w - 1) n . u)               (sums over latent dims)

which has the minimum E[w n | x] / E[w | x] = velocity_tilt - velocity_base; without the 1, which changes no
mean, it is w |velocity_policy - (noise - clean)|^2 up to a constant, with more noise. c = 2 (1 - sigma) /
sigma, at most `rwm_max_weight`: half of its mean of |u|^2 is the path KL, so that what can't be learned costs
what it weighs. Images stay those of the base: nothing drifts, and the larger the scale, the fewer count (the
frontier's effective share; about one nat is what it can do). Weights of a group are at most G, which shrinks
the tilt by terms of order 1 / G. Reward-weighted regression: Peters and Schaal 2007; for flow matching, on
the policy's own images, Fan et al. (ICLR 2025, arXiv 2502.06061). Passes a sample: K calls of the base, and
for each noise level one of the base and the regression's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from am_diffusers.methods.parts import laws, linear_base
from am_diffusers.methods.parts.advantages import group_weights, reward_values
from am_diffusers.methods.parts.end_points import EndPointSettings, draw_images
from am_diffusers.methods.parts.matching_method import MatchingMethod
from am_diffusers.methods.parts.ranges import require
from am_diffusers.methods.parts.reports import means
from am_diffusers.methods.parts.rows import Chunk, Rows
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.parametrization import interpolate
from am_diffusers.system.failures import phase
from am_diffusers.velocity import Conditioning


@dataclass(frozen=True)
class RewardWeightedSettings(EndPointSettings):
    """`method: reward_weighted_matching`.

    Attributes:
        rwm_noises: noise levels that each image is put back to, one in each of as many equal parts of (0, 1].
        rwm_sigma_min: noise level below which nothing is learned, in [0, 1): rows there only hold the policy
            to the base. What is decided later stays the base's; 0 = everything is learned, with more noise.
        rwm_max_weight: largest weight 2 (1 - sigma) / sigma of a row; Adjoint Matching's has no bound.
    """

    rwm_noises: int = 8
    rwm_sigma_min: float = 0.0
    rwm_max_weight: float = 20.0

    def __post_init__(self) -> None:
        require(
            self,
            [
                (1 <= self.rwm_noises <= 1000, "rwm_noises", "from 1 to 1000"),
                (0 <= self.rwm_sigma_min < 1, "rwm_sigma_min", "in [0, 1)"),
                (self.rwm_max_weight > 0, "rwm_max_weight", "positive"),
            ],
        )


class Weighed(NamedTuple):
    """Images of an iteration: clean latents (B, ...), rewards (B,) and weights (B,) with mean 1 a prompt."""

    clean: Tensor
    rewards: Tensor
    weights: Tensor


class RewardWeightedMatching(MatchingMethod[Weighed]):
    """Reward-weighted flow matching on images of the base."""

    title, paper = "Reward-weighted flow matching", "2502.06061"
    Settings = RewardWeightedSettings
    reads = ("num_inference_steps",)
    needs_reward_gradient = False
    compares_samples = True
    aims_at_tilt = True
    guided_everywhere = True
    own: RewardWeightedSettings

    @classmethod
    def law(cls, shared: SharedSettings, own: RewardWeightedSettings) -> str:
        """Return the tilt, as far as it is decided early, see `Method.law`."""
        return laws.by_weights(shared, own.rwm_sigma_min)

    def prepare(
        self, cond: Conditioning, generators: Sequence[torch.Generator], shared: torch.Generator
    ) -> Weighed:
        """Return images of the base with their weights.

        Raises:
            ValueError: if the samples of a group don't share a prompt.
        """
        clean = draw_images(self, self.base, cond, generators)
        rewards = reward_values(self.around.reward, clean, cond.prompts, batch_size=self.sizes.reward)
        weights = group_weights(self.shared.scale * rewards, cond.prompts, self.shared.samples_per_prompt)
        return Weighed(clean, rewards, weights)

    def chunk(
        self, common: Weighed, ids: list[int], cond: Conditioning, generators: Sequence[torch.Generator]
    ) -> Chunk:
        """Return the images put back to noise, with targets, see `MatchingMethod.chunk`."""
        clean, rewards, weights = (column[ids] for column in common)
        number, parts = self.own.rwm_noises, []
        levels = torch.stack([linear_base.stratified_sigmas(number, 0.0, g) for g in generators], 1)
        for sigma in levels.to(clean):
            noise = self.latents.draw(generators)
            x = interpolate(clean, noise, sigma)
            with phase("rollout", len(cond)):
                base = self.base(x, sigma, cond)
            factor = torch.where(sigma >= self.own.rwm_sigma_min, weights, 1.0)
            shape = -1, *[1] * (clean.ndim - 1)
            target = base + (1 - 1 / factor).view(shape) * (noise - clean - base)
            weight = factor * linear_base.capped_weight(sigma, self.own.rwm_max_weight)
            parts.append((x, target, sigma, weight, torch.ones_like(sigma)))
        stats = {"reward": rewards, "weight": weights}
        return Chunk(Rows(*(torch.stack(column, 1) for column in zip(*parts, strict=True))), stats)

    def report(self, columns: dict[str, Tensor]) -> tuple[dict[str, float], Sequence[str]]:
        """Return numbers to log: of weights the effective share of the images."""
        weights = columns.pop("weight")
        share = weights.sum().square() / (len(weights) * weights.square().sum())
        return means(columns) | {"effective_share": share.item()}, ()
