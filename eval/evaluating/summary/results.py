"""Measured results in memory: the source of the summary, the tables and the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from am_diffusers.evaluation.statistics import Array
from am_diffusers.prompts.sets import PromptSet
from evaluating.candidates import Candidate
from evaluating.summary.tilt import Target


@dataclass(frozen=True)
class Results:
    """Complete results of an evaluation: P prompts, S images per prompt, the same noise for all candidates.

    Attributes:
        folder: the output folder.
        settings: what the images depend on beside prompts and candidates (settings.json): plain JSON
            values, among them pretrained_model_name_or_path, sampler, seed, resolution.
        prompts: P prompts.
        candidates: bases first; every other one's `base` is among them.
        scores: by candidate key, then reward name: (P, S), in the reward's units, higher is better.
        features: by candidate key, then name of the features: (P, S, D), any norm. May be empty.
        reference_features: by name of the features: (N, D) of reference images. May be empty.
        path_kl: by candidate key: (P, S) in nats, of tuned candidates of a stochastic table. May be empty.
        changes: by candidate key: (P, S) LPIPS distance to the base image of the same noise. May be empty.
        trained: names of the rewards each LoRA was trained on, by candidate name, where its run is known.
        targets: law that the run of each LoRA aimed at, by candidate name, where it is known and a tilt.
        reward_models: where each reward's weights are, by reward name; None = it has none.
        notes: what a reader must know: leaks, duplicates, truncated prompts.
    """

    folder: Path
    settings: Mapping[str, object]
    prompts: PromptSet
    candidates: tuple[Candidate, ...]
    scores: Mapping[str, Mapping[str, Array]]
    features: Mapping[str, Mapping[str, Array]]
    reference_features: Mapping[str, Array]
    path_kl: Mapping[str, Array]
    changes: Mapping[str, Array]
    trained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    reward_models: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tuned(self) -> tuple[Candidate, ...]:
        """The candidates with a LoRA."""
        return tuple(candidate for candidate in self.candidates if not candidate.is_base)

    def role(self, candidate: Candidate, reward: str) -> str:
        """Return `trained` or `held-out`, by the rewards the candidate was trained on; "" if unknown."""
        trained = self.trained.get(candidate.name)
        if trained is None:
            return ""
        return "trained" if reward in trained else "held-out"

    def image(self, candidate: Candidate, prompt: int, image: int) -> Path:
        """Return the file of an image: an 8-bit RGB PNG."""
        return self.folder / "pictures" / candidate.key / f"{prompt:05d}-{image:03d}.png"
