"""Does the tuned model differ from the base, and by how much: paired scores, intervals, diversity.

Base and tuned pictures share prompt, noise, sampler and guidance, so each pair differs by the adapter only.
Prompts are the unit that generalises: intervals are 95 % percentile bootstraps over prompts (Efron 1979).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
RESAMPLES = 9999
_BATCH = 1000  # resamples held in memory at a time; doesn't change them


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RewardGain:
    """What one reward says about the tuned model.

    Attributes:
        role: trained or held-out.
        base_mean: mean score of the base pictures, in the reward's units.
        tuned_mean: mean score of the tuned pictures, in the reward's units.
        base_sd: standard deviation over all base pictures, in the reward's units.
        gain: mean paired difference in base standard deviations.
    """

    role: str
    base_mean: float
    tuned_mean: float
    base_sd: float
    gain: Interval


@dataclass(frozen=True)
class Diversity:
    """How different the pictures of one prompt are.

    Attributes:
        features: name of the reward whose image features are compared.
        base: mean over prompts of the mean pairwise 1 - cos of the base pictures.
        tuned: the same of the tuned pictures.
        kept: tuned / base.
    """

    features: str
    base: float
    tuned: float
    kept: Interval


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


def bootstrap(
    statistic: Callable[..., Array], *samples: Array, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Statistic of paired samples with its 95 % percentile bootstrap interval over their first dimension.

    Args:
        statistic: vectorised: takes the samples and `axis`, reduces that axis.
        samples: arrays of shape (P,), resampled together, P >= 2.
        seed: of the resampling.
        resamples: how many.
    """
    result = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=min(_BATCH, resamples),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(statistic(*samples, axis=-1)), float(result.low), float(result.high))


def reward_gain(base: Array, tuned: Array, role: str) -> RewardGain:
    """Paired gain of one reward.

    Args:
        base: scores of the base pictures, (P prompts, S pictures a prompt).
        tuned: scores of the tuned pictures made from the same noise, (P, S).
        role: trained or held-out.

    Raises:
        ValueError: if all base pictures score the same, so that there's no unit to measure a gain in.
    """
    base_sd = float(base.std(ddof=1))
    if not base_sd > 0:
        raise ValueError(f"the {role} reward scores all {base.size} base pictures {base.flat[0]}: no spread")
    gain = bootstrap(np.mean, (tuned - base).mean(axis=1) / base_sd)
    return RewardGain(role, float(base.mean()), float(tuned.mean()), base_sd, gain)


def pairwise_distance(features: Array) -> Array:
    """Mean pairwise 1 - cos among the pictures of each prompt.

    Args:
        features: image features, (P prompts, S >= 2 pictures, D), any norm.

    Returns:
        (P,), each in [0, 2].
    """
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    count = unit.shape[1]
    cosines = np.einsum("psd,ptd->pst", unit, unit)
    return 1 - (cosines.sum(axis=(1, 2)) - np.trace(cosines, axis1=1, axis2=2)) / (count * (count - 1))


def diversity(name: str, base: Array, tuned: Array) -> Diversity:
    """Diversity kept, from image features (P, S, D) of base and tuned pictures."""
    distances = pairwise_distance(base), pairwise_distance(tuned)
    kept = bootstrap(ratio_of_means, *distances)
    return Diversity(name, float(distances[0].mean()), float(distances[1].mean()), kept)


def ratio_of_means(base: Array, tuned: Array, axis: int) -> Array:
    """Mean of `tuned` over mean of `base`: the diversity kept, from the distances of each prompt."""
    return tuned.mean(axis=axis) / base.mean(axis=axis)


@dataclass(frozen=True)
class PairScore:
    """Scores of one base picture and the tuned picture from the same noise.

    Attributes:
        prompt: index of the evaluation prompt.
        image: index of the picture among those of its prompt.
        scores: by reward name, (base, tuned).
        features: image features (2, D) of base and tuned, or None.
    """

    prompt: int
    image: int
    scores: dict[str, tuple[float, float]]
    features: Array | None

    @classmethod
    def of(
        cls,
        picture: tuple[int, int],
        scores: Sequence[dict[str, float]],
        features: Sequence[Array | None],
    ) -> "PairScore":
        """From (base, tuned) scores and features of the picture (prompt, image)."""
        base, tuned = scores
        known = [feature for feature in features if feature is not None]
        paired = {name: (base[name], tuned[name]) for name in base}
        return cls(*picture, paired, np.stack(known) if known else None)


def by_prompt(pairs: Sequence[PairScore]) -> tuple[dict[str, Array], Array | None]:
    """Scores and features of all pairs, whatever order and processes they come from.

    Args:
        pairs: one for every (prompt, image).

    Returns:
        Scores by reward name, (P prompts, S pictures a prompt, 2: base and tuned), and features
        (P, S, 2, D) if there are any.
    """
    ordered = sorted(pairs, key=lambda pair: (pair.prompt, pair.image))
    num_images = 1 + max(pair.image for pair in ordered)
    shape = (len(ordered) // num_images, num_images, 2)
    scores = {
        name: np.array([pair.scores[name] for pair in ordered]).reshape(shape) for name in ordered[0].scores
    }
    known = [pair.features for pair in ordered if pair.features is not None]
    return scores, np.stack(known).reshape(*shape, -1) if known else None


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
