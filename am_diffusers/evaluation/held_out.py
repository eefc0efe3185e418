"""The evaluation on held-out prompts: rewards of base and tuned model on the same noise, and diversity."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from am_diffusers.evaluation.pairs import PairScore, Scorer, by_prompt
from am_diffusers.evaluation.statistics import Diversity, RewardGain, diversity, reward_gain


@dataclass(frozen=True)
class Evaluation:
    """Result of a held-out evaluation; `asdict` of it is evaluation.json.

    Attributes:
        num_prompts: evaluation prompts.
        images_per_prompt: pictures a prompt, for base and tuned each.
        rewards: gain by reward name.
        diversity: None if no evaluated reward has image features.
    """

    num_prompts: int
    images_per_prompt: int
    rewards: dict[str, RewardGain]
    diversity: Diversity | None

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return asdict(self)

    def headline(self) -> list[str]:
        """The lines a run ends with: every reward's gain, and the diversity kept."""
        lines = [
            f"{result.role} reward {name}: {result.gain.value:+.2f} base sd "
            f"[{result.gain.low:+.2f}, {result.gain.high:+.2f}] "
            f"({result.base_mean:.4g} -> {result.tuned_mean:.4g})"
            for name, result in self.rewards.items()
        ]
        if self.diversity is not None:
            kept = self.diversity.kept
            lines.append(
                f"diversity kept ({self.diversity.features} image features): "
                f"{kept.value:.0%} [{kept.low:.0%}, {kept.high:.0%}]"
            )
        return lines


def summarise(pairs: Sequence[PairScore], roles: dict[str, str], features: str | None) -> Evaluation:
    """Evaluation of all pairs, whatever order and processes they come from.

    Args:
        pairs: one for every (prompt, image).
        roles: trained or held-out, by reward name, in the order of the report.
        features: name of the reward the features belong to; None if there are none.
    """
    scores, shaped = by_prompt(pairs)
    rewards = {
        name: reward_gain(scores[name][..., 0], scores[name][..., 1], role) for name, role in roles.items()
    }
    kept = None
    if features is not None and shaped is not None:
        kept = diversity(features, shaped[:, :, 0], shaped[:, :, 1])
    num_prompts, num_images = next(iter(scores.values())).shape[:2]
    return Evaluation(num_prompts, num_images, rewards, kept)


@dataclass(frozen=True)
class HeldOut:
    """The evaluation at the end.

    Attributes:
        scorer: makes and scores pairs of pictures.
        prompts: held-out prompts.
        images_per_prompt: pictures a prompt, for base and tuned each.
        roles: trained or held-out, by reward name, in the order of the report.
    """

    scorer: Scorer
    prompts: Sequence[str]
    images_per_prompt: int
    roles: dict[str, str]
