"""The evaluation on held-out prompts: rewards of base and tuned model on the same noise, and diversity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from am_diffusers.evaluation.certificate import Certificate
from am_diffusers.evaluation.images import image_ids, share_of
from am_diffusers.evaluation.judged import Judged, judge
from am_diffusers.evaluation.pairs import PairScore, Scorer, by_prompt
from am_diffusers.evaluation.statistics import Comparison, Diversity, compare, diversity
from am_diffusers.system.processes import Processes


@dataclass(frozen=True)
class Evaluation:
    """Result of a held-out evaluation.

    Attributes:
        num_prompts: number of evaluation prompts.
        images_per_prompt: images a prompt, for base and tuned each.
        roles: `trained` or `held-out`, by reward name, in the order of the report.
        rewards: tuned against base, by reward name.
        diversity: None if no evaluated reward has image features.
        judged: what the judge of the embedded world says; None if it wasn't asked.
        certificate: distance from the tilt by the chain of training; None if it wasn't measured.
    """

    num_prompts: int
    images_per_prompt: int
    roles: Mapping[str, str]
    rewards: Mapping[str, Comparison]
    diversity: Diversity | None
    judged: Judged | None = None
    certificate: Certificate | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the plain JSON values of evaluation.json."""
        return {
            "num_prompts": self.num_prompts,
            "images_per_prompt": self.images_per_prompt,
            "rewards": {
                name: {"role": self.roles[name], **asdict(each)} for name, each in self.rewards.items()
            },
            "diversity": None if self.diversity is None else asdict(self.diversity),
            "judged": None if self.judged is None else asdict(self.judged),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
        }

    def headline(self) -> list[str]:
        """Return the lines that a run ends with: gains, diversity, and the distance from the tilt."""
        lines = [f"{self.roles[name]} reward {name}: {_gain(each)}" for name, each in self.rewards.items()]
        if self.diversity is not None and self.diversity.kept is not None:
            kept = self.diversity.kept.text(".0%")
            lines.append(f"diversity kept ({self.diversity.features} image features): {kept}")
        lines += [] if self.judged is None else self.judged.headline()
        return lines + ([] if self.certificate is None else self.certificate.headline())


def _gain(found: Comparison) -> str:
    means = f"({found.base_mean:.4g} -> {found.tuned_mean:.4g})"
    if found.gain is None:
        return f"no gain in base sd, as all base images have the same score {means}"
    return f"{found.gain.text('+.2f', 'base sd')} {means}"


def summarise(pairs: Sequence[PairScore], roles: Mapping[str, str], features: str | None) -> Evaluation:
    """Return the evaluation of all pairs, whatever order and processes they come from.

    Args:
        pairs: one for every (prompt, image).
        roles: `trained` or `held-out`, by reward name, in the order of the report.
        features: name of the reward the features belong to; None if there are none.
    """
    scores, shaped = by_prompt(pairs)
    rewards = {name: compare(scores[name][..., 0], scores[name][..., 1]) for name in roles}
    kept = None
    if features is not None and shaped is not None:
        kept = diversity(features, shaped[:, :, 0], shaped[:, :, 1])
    num_prompts, num_images = next(iter(scores.values())).shape[:2]
    return Evaluation(num_prompts, num_images, dict(roles), rewards, kept, judge(scores, shaped))


@dataclass(frozen=True)
class HeldOut:
    """The evaluation at the end.

    Attributes:
        scorer: makes and scores pairs of images.
        prompts: held-out prompts.
        images_per_prompt: images a prompt, for base and tuned each.
        roles: `trained` or `held-out`, by reward name, in the order of the report.
        certify: measures the distance from the tilt; None = it isn't measured.
    """

    scorer: Scorer
    prompts: Sequence[str]
    images_per_prompt: int
    roles: Mapping[str, str]
    certify: Callable[[], Certificate] | None = None

    def evaluate(self, processes: Processes) -> Evaluation:
        """Make and score this process's share of the images; return the evaluation of all of them.

        All processes call it, inside `processes.together()`.
        """
        which = image_ids(len(self.prompts), self.images_per_prompt)
        mine = share_of(which, processes.index, processes.number)
        pairs = processes.gather_objects(self.scorer.pairs(self.prompts, mine))
        found = {(pair.prompt, pair.image): pair for pair in pairs}
        features = None if self.scorer.features is None else self.scorer.features.name
        evaluation = summarise([found[image] for image in which], self.roles, features)
        return replace(evaluation, certificate=self.certify and self.certify())
