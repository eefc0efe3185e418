"""What the report says of each tuned candidate, read from the summary document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluating.candidates import Candidate
from evaluating.results import Results

from am_diffusers.evaluation import Interval

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


@dataclass(frozen=True)
class RewardFinding:
    """What one reward says of a tuned candidate.

    Attributes:
        reward: its name.
        base_mean: mean score of the base pictures, in the reward's units.
        tuned_mean: mean score of the tuned pictures, in the reward's units.
        gain: mean paired difference in base standard deviations.
        win_rate: share of pairs whose tuned picture scores higher, ties counted half.
        p: of the Wilcoxon signed-rank test.
    """

    reward: str
    base_mean: float
    tuned_mean: float
    gain: Interval
    win_rate: float
    p: float

    @property
    def verdict(self) -> str:
        """In words: clear is what has zero outside its interval."""
        if self.gain.low > 0:
            return BETTER
        return WORSE if self.gain.high < 0 else UNCLEAR


@dataclass(frozen=True)
class CategoryFinding:
    """Gains on the prompts of one category.

    Attributes:
        name: of the category.
        num_prompts: in it.
        gains: by reward name, in base standard deviations; a reward is missing where nothing can be said.
    """

    name: str
    num_prompts: int
    gains: dict[str, Interval]


@dataclass(frozen=True)
class Finding:
    """What was found of one tuned candidate.

    Attributes:
        candidate: it.
        label: its name, with what tells it from the others.
        rewards: one by one.
        kept: diversity of its pictures, relative to the base's, by name of the features.
        path_kl: in nats; None = not measured.
        categories: by category column.
    """

    candidate: Candidate
    label: str
    rewards: tuple[RewardFinding, ...]
    kept: dict[str, Interval]
    path_kl: Interval | None
    categories: dict[str, tuple[CategoryFinding, ...]]

    def verdicts(self) -> dict[str, list[str]]:
        """Names of the rewards by verdict; a verdict that none has is missing."""
        found = {
            verdict: [reward.reward for reward in self.rewards if reward.verdict == verdict]
            for verdict in (BETTER, WORSE, UNCLEAR)
        }
        return {verdict: names for verdict, names in found.items() if names}


def candidate_labels(candidates: Sequence[Candidate]) -> dict[str, str]:
    """By candidate key: its name, and scale, steps and guidance where not all candidates agree on them."""
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


def read_findings(results: Results, summary: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Findings of all tuned candidates, in the order of `results`.

    Args:
        results: of the evaluation.
        summary: summary.json of the same results.
    """
    labels = candidate_labels(results.candidates)
    return tuple(
        _finding(candidate, labels[candidate.key], summary["candidates"][candidate.key])
        for candidate in results.tuned
    )


def _finding(candidate: Candidate, label: str, entry: Mapping[str, Any]) -> Finding:
    return Finding(
        candidate,
        label,
        tuple(_reward(name, found) for name, found in entry["rewards"].items()),
        {name: Interval(**found["kept"]) for name, found in entry["diversity"].items()},
        Interval(**entry["path_kl"]) if entry["path_kl"] else None,
        {
            column: tuple(
                CategoryFinding(
                    name,
                    found["num_prompts"],
                    {reward: Interval(**gain["gain"]) for reward, gain in found["rewards"].items()},
                )
                for name, found in values.items()
            )
            for column, values in entry["categories"].items()
        },
    )


def _reward(name: str, found: Mapping[str, Any]) -> RewardFinding:
    return RewardFinding(
        name,
        found["base_mean"],
        found["tuned_mean"],
        Interval(**found["gain"]),
        found["win_rate"],
        found["p"],
    )
