"""The certificate: how far a tuned model is from base * exp(scale * reward), as a number in nats.

For the memoryless chain of training, whose last step is the base's, and for each prompt

    tilt_gap = log E_base[exp(scale r)] - (scale E_tuned[r] - path_kl)
             = KL(tuned path law | optimal path law) >= 0

with equality only at the optimum: dP* / dP_base = exp(scale r(x_K)) / E_base[exp(scale r)] on paths, so that
KL(P | P*) = KL(P | P_base) - scale E_P[r] + log E_base[exp(scale r)]. Total variation is at most
sqrt(tilt_gap / 2). The run's objective is what it maximises, counted from the base, and the headroom the
most it can be:

    objective = scale (E_tuned[r] - E_base[r]) - path_kl
    headroom  = log E_base[exp(scale r)] - scale E_base[r]
    tilt_gap  = headroom - objective
    attained  = objective / headroom

Two more numbers do not depend on the scale. A small control along the optimal one gains sqrt(2 var(r)
path_kl), so

    cosine    = gain / sqrt(2 var(r) path_kl)
    excess_kl = path_kl / (the frontier's KL at this gain)

tell how well the control points along the optimal one, and how many times its KL is what it need be. Rewards
of tuned and base images from the same noise are paired; intervals are over prompts (`statistics.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.outcomes import Outcome, outcomes
from am_diffusers.evaluation.readings import Rows
from am_diffusers.evaluation.statistics import RESAMPLES, Array, Estimate, estimate

NOTHING = 0.01
"""Headroom, in nats, below which a run has nothing to learn."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """Images of a tuned model by the memoryless chain, from the noise of the frontier's first images.

    Attributes:
        rewards: reward that was trained, (P prompts, S <= N images).
        path_kl: KL divergence of the steps from the base's, (P, S), in nats.
        scores: raw scores by reward name, of trained and held-out ones, (P, S) each.
    """

    rewards: Array
    path_kl: Array
    scores: Mapping[str, Array] = field(default_factory=dict)

    def gain(self, frontier: Frontier) -> Array:
        """Return the mean reward of each prompt less that of the base's images of the same noise, (P,)."""
        return (self.rewards - frontier.rewards[:, : self.rewards.shape[1]]).mean(axis=1)


@dataclass(frozen=True)
class Certificate:
    """Distance of a tuned model from the tilt; each number a mean over prompts with its 95 % interval.

    Attributes:
        gain: E_tuned[r] - E_base[r], in the reward's units.
        path_kl: KL divergence of the tuned chain from the base's, in nats.
        predicted: gain of the tilt itself; None, as all numbers that need its normaliser, where the base
            images can't tell.
        objective: what the run maximises, over the base's, in nats.
        tilt_gap: KL divergence from the tilt's path law, in nats; 0 = the right answer.
        attained: share of the headroom that is reached; 1 = the right answer.
        excess_kl: path KL over the frontier's KL at the same gain; 1 = the right answer for some scale. None
            without a gain, or with one beyond what the base images can tell.
        cosine: share of the reward a small control of this path KL could have gained.
        best_of_n: number of base images of which the best equals the tuned mean, at most N.
        effective_share: effective share of base images at this scale.
        least_share: the least at which these base images can tell.
        largest_scale: largest scale at which these base images can tell.
        outcomes: raw scores beside the tilt's, by reward name.
    """

    gain: Estimate
    path_kl: Estimate
    predicted: Estimate | None
    objective: Estimate
    tilt_gap: Estimate | None
    attained: Estimate | None
    excess_kl: Estimate | None
    cosine: Estimate | None
    best_of_n: Estimate
    effective_share: float
    least_share: float
    largest_scale: float
    outcomes: Mapping[str, Outcome]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Return those numbers that are known, by name."""
        return {name: each for name, each in self.__dict__.items() if isinstance(each, Estimate)}

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values; an infinite largest scale, at which any can be told, is None."""
        document: dict[str, object] = asdict(self)
        return document | {"largest_scale": self.largest_scale if math.isfinite(self.largest_scale) else None}

    def headline(self) -> list[str]:
        """Return the lines that a run ends with, of images by the chain of training."""
        parts = {
            "path KL": self.path_kl.text(".2f", "nats"),
            "times the KL of the tilt that gains as much": self.excess_kl and self.excess_kl.text(".1f"),
            "cosine with the optimal control": self.cosine and self.cosine.text(".2f"),
            "equals the best of as many base images": self.best_of_n.text(".1f"),
        }
        told = [f"{name}: {value}" for name, value in parts.items() if value]
        scores = [f"{name} by the chain of training: {each.text()}" for name, each in self.outcomes.items()]
        return [self.verdict(), *told, *scores]

    def verdict(self) -> str:
        """Say in a sentence where the tuned model stands."""
        if self.tilt_gap is None or self.attained is None:
            return (
                "too few base images to tell at this reward_scale (effective share "
                f"{self.effective_share:.0%}, {self.least_share:.0%} is needed): they tell up to "
                f"reward_scale {self.largest_scale:.3g}"
            )
        headroom = self.objective.value + self.tilt_gap.value
        if headroom < NOTHING:
            return f"there is next to nothing to gain at this reward_scale: {headroom:.2g} nats over the base"
        return (
            f"tilt gap {self.tilt_gap.text('.2f', 'nats')}: "
            f"{self.attained.text('.0%')} of what was to be gained over the base is attained"
        )


def certify(frontier: Frontier, scale: float, tuned: Tuned, *, resamples: int = RESAMPLES) -> Certificate:
    """Compare a tuned model with the tilt by exp(scale * reward).

    Args:
        frontier: rewards of the base's images by the memoryless chain.
        scale: reward_scale of the run, > 0.
        tuned: rewards and path KL of the tuned model.
        resamples: number of resamples of the bootstrap.
    """
    gain, path_kl = tuned.gain(frontier), tuned.path_kl.mean(axis=1)
    return certify_means(frontier, scale, gain, path_kl, tuned.scores, resamples=resamples)


def certify_means(
    frontier: Frontier,
    scale: float,
    gain: Array,
    path_kl: Array,
    scores: Mapping[str, Array],
    *,
    resamples: int = RESAMPLES,
) -> Certificate:
    """Compare a tuned model with the tilt by the means of each prompt, see `certify`.

    Args:
        frontier: rewards of the base's images by the memoryless chain.
        scale: reward_scale of the run, > 0.
        gain: mean reward over the base's, (P,).
        path_kl: KL divergence of the steps from the base's in nats, (P,).
        scores: raw scores by reward name, (P, S) each.
        resamples: number of resamples of the bootstrap.
    """

    def mean(values: Array) -> Estimate:
        return estimate(np.mean, values, resamples=resamples)

    rows = Rows(frontier, resamples)
    base = frontier.rewards.mean(axis=1)
    tilted = frontier.tilt(scale)
    objective, headroom = scale * gain - path_kl, tilted.log_normaliser - scale * base
    share = float(tilted.effective_share.mean())
    known = share >= frontier.least_share and headroom.mean() > 0
    attained = rows.estimate(lambda rows: objective[rows].mean(-1) / headroom[rows].mean(-1))
    return Certificate(
        gain=mean(gain),
        path_kl=mean(path_kl),
        predicted=mean(tilted.reward - base) if known else None,
        objective=mean(objective),
        tilt_gap=mean(headroom - objective) if known else None,
        attained=attained if known else None,
        excess_kl=rows.excess_kl(gain, path_kl),
        cosine=rows.cosine(gain, path_kl),
        best_of_n=rows.best_of_n(gain),
        effective_share=share,
        least_share=frontier.least_share,
        largest_scale=frontier.largest_scale,
        outcomes=outcomes(frontier, scale, scores, known=known, resamples=resamples),
    )
