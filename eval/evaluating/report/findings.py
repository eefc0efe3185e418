"""Findings of the report on each tuned candidate: the summary's numbers, named and put in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from am_diffusers.evaluation.statistics import Comparison, Estimate
from evaluating.candidates import Candidate
from evaluating.summary.results import Results
from evaluating.summary.summary import FEWEST_PROMPTS, AgainstBase, Summary

BETTER, WORSE, UNCLEAR, TOO_FEW = "better", "worse", "no clear difference", "too few prompts"


class TiltGain(NamedTuple):
    """Gain that the tilt would have, and the model's; in base sd.

    Attributes:
        name: name of the reward.
        role: `trained` or `held-out`.
        predicted: gain of the tilt; None where the base images can't tell.
        gain: gain of the model.
    """

    name: str
    role: str
    predicted: Estimate | None
    gain: Estimate


@dataclass(frozen=True)
class Finding:
    """Findings on a tuned candidate.

    Attributes:
        number: number in the tables and figures, from 1.
        place: index among all candidates of the evaluation, from 0.
        candidate: the candidate.
        label: name of the candidate, with what distinguishes it from the others.
        against: comparison in the summary.
    """

    number: int
    place: int
    candidate: Candidate
    label: str
    against: AgainstBase

    @property
    def gains(self) -> dict[str, Estimate]:
        """Gains by reward name, in base sd; a reward by which all base images score the same is missing."""
        found = {name: reward.overall.gain for name, reward in self.against.rewards.items()}
        return {name: gain for name, gain in found.items() if gain is not None}

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """Names of the rewards by verdict; a verdict that none has is missing."""
        words = {name: verdict(reward.overall) for name, reward in self.against.rewards.items()}
        order = (BETTER, WORSE, UNCLEAR, TOO_FEW)
        found = {word: [name for name in words if words[name] == word] for word in order}
        return {word: names for word, names in found.items() if names}

    @property
    def tilt_gains(self) -> list[TiltGain]:
        """Gains of tilt and model: those of the weighted sum, of trained rewards, of the others."""
        tilt, rewards = self.against.tilt, self.against.rewards
        if tilt is None:
            return []
        predicted, gain = tilt.certificate.get("predicted"), tilt.certificate["gain"]
        total = TiltGain(
            "weighted sum",
            "trained",
            predicted and predicted.scaled(1 / tilt.base_sd),
            gain.scaled(1 / tilt.base_sd),
        )
        trained = [name for name, reward in rewards.items() if reward.role == "trained"]
        first = [total] if len(trained) > 1 else []
        names = sorted(self.gains, key=lambda name: name not in trained)
        return first + [
            TiltGain(name, rewards[name].role, tilt.predicted.get(name), self.gains[name]) for name in names
        ]

    def category_gains(self, reward: str, column: str) -> dict[str, Comparison]:
        """Return the comparisons by category that have a gain."""
        found = self.against.rewards[reward].categories[column]
        return {name: comparison for name, comparison in found.items() if comparison.gain is not None}


def verdict(comparison: Comparison) -> str:
    """Put a comparison in words: no clear difference unless significant, which few prompts can't be."""
    if comparison.num_prompts < FEWEST_PROMPTS:
        return TOO_FEW
    if not comparison.significant:
        return UNCLEAR
    return BETTER if comparison.difference.value > 0 else WORSE


def candidate_labels(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Return labels by candidate key: name, and scale, steps and guidance where candidates differ in them."""
    scales = {candidate.lora_scale for candidate in candidates if not candidate.is_base}
    steps = {candidate.num_inference_steps for candidate in candidates}
    guidance = {candidate.guidance_scale for candidate in candidates}
    return {
        candidate.key: ", ".join(
            [candidate.name]
            + [f"scale {candidate.lora_scale:g}"] * (len(scales) > 1 and not candidate.is_base)
            + [f"{candidate.num_inference_steps} steps"] * (len(steps) > 1)
            + [f"guidance {candidate.guidance_scale:g}"] * (len(guidance) > 1)
        )
        for candidate in candidates
    }


def read_findings(results: Results, summary: Summary) -> tuple[Finding, ...]:
    """Return the findings on all tuned candidates, in the order of `results`.

    Args:
        results: results of the evaluation.
        summary: summary of the same results.
    """
    labels = candidate_labels(results.candidates)
    against = {found.key: found.against_base for found in summary.candidates}
    places = [place for place, candidate in enumerate(results.candidates) if not candidate.is_base]
    found: list[Finding] = []
    for number, place in enumerate(places, 1):
        candidate = results.candidates[place]
        comparison = against.get(candidate.key)
        if comparison is None:
            raise ValueError(f"{candidate.key}: expected a comparison in the summary: it's of other results")
        found.append(Finding(number, place, candidate, labels[candidate.key], comparison))
    return tuple(found)
