"""Groups of evaluations that fit in one table, and in words what distinguishes the groups.

Images of other prompts, seeds, samplers or bases give other numbers for the same model, and so do other
weights of the same reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from evaluating.summary.summary import Summary

# Of the same base images; beyond it, in standard deviations of them, something else scored them.
SAME_SCORES = 0.02
SOURCE = "prompts from"
# The summary has these by other names.
REPEATED = ("prompts", "num_prompts", "num_images_per_prompt", "prompt_source")


@dataclass(frozen=True)
class Evaluated:
    """A summary and where it was found.

    Attributes:
        name: folder of the summary, relative to the one that was searched.
        summary: what was in it.
    """

    name: str
    summary: Summary


def group(evaluations: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """Group evaluations whose numbers can be compared.

    One without a reward that others have by two weights fits either; it goes to the first.
    """
    groups: list[list[Evaluated]] = []
    for each in evaluations:
        fitting = (members for members in groups if all(_alike(each.summary, m.summary) for m in members))
        members = next(fitting, None)
        if members is None:
            groups.append([each])
        else:
            members.append(each)
    return groups


def _alike(one: Summary, other: Summary) -> bool:
    return one.fingerprint == other.fingerprint and not _other_weights(one.reward_models, other.reward_models)


def _other_weights(one: dict[str, str | None], other: dict[str, str | None]) -> list[str]:
    """Name rewards that both have, by different weights."""
    return [name for name in one if name in other and one[name] != other[name]]


def describe(members: Sequence[Evaluated]) -> str:
    """Describe what the evaluations of one group were made and scored with."""
    settings = {name: value for name, value in _made_with(members[0].summary).items() if value is not None}
    weights = {f"{name} weights": model for name, model in _weights(members).items() if model}
    return ", ".join(f"{name} {value}" for name, value in (settings | weights).items())


def differences(groups: Sequence[Sequence[Evaluated]]) -> list[str]:
    """Name what isn't the same for all groups."""
    found: dict[str, None] = {}
    for pair in combinations(groups, 2):
        one, other = (_made_with(members[0].summary) for members in pair)
        names = [name for name in one | other if name != SOURCE and one.get(name) != other.get(name)]
        rewards = _other_weights(*(_weights(members) for members in pair))
        found |= dict.fromkeys([*names, *(f"{reward} weights" for reward in rewards)])
    return list(found)


def _made_with(summary: Summary) -> dict[str, object]:
    return {
        "prompts": f"{summary.num_prompts} ({summary.prompts_sha256[:8]})",
        SOURCE: summary.settings.get("prompt_source"),
        "images per prompt": summary.images_per_prompt,
        **{name: value for name, value in summary.settings.items() if name not in REPEATED},
    }


def _weights(members: Sequence[Evaluated]) -> dict[str, str | None]:
    """Return the weights by reward; members of one group have the same ones."""
    return {name: model for each in members for name, model in each.summary.reward_models.items()}


def disagreements(evaluations: Sequence[Evaluated]) -> list[str]:
    """Return sentences about base images that are the same and scored otherwise."""
    compared = [
        (each.name, reward, against.base, result.overall)
        for each in evaluations
        for against in (candidate.against_base for candidate in each.summary.candidates)
        if against is not None
        for reward, result in against.rewards.items()
    ]
    first = {(reward, base): (name, result) for name, reward, base, result in reversed(compared)}
    sentences = []
    for name, reward, base, result in compared:
        other, known = first[reward, base]
        if abs(known.base_mean - result.base_mean) > SAME_SCORES * (known.base_sd or 0.0):
            sentences.append(
                f"The base images score differently in {reward} in {other} and {name}: with another reward "
                "model? Then their numbers can't be compared."
            )
    return list(dict.fromkeys(sentences))
