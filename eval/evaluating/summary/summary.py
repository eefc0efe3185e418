"""summary.json: what an evaluation found, as numbers with their intervals, and how it is read back.

It is a function of the results alone: no time, no machine, the same bytes again. Numbers of prompts stand for
prompts in general; so intervals, 95 %, are over prompts (`am_diffusers.evaluation.statistics`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from am_diffusers.evaluation.statistics import Comparison, Estimate
from am_diffusers.prompts.sets import PromptSet
from am_diffusers.system.files import sha256_of_text, write_text
from am_diffusers.system.text import redact_values
from evaluating.summary.frechet import FrechetFromBase
from evaluating.summary.tilt import TiltComparison

SUMMARY_FILE = "summary.json"
# The least p of the Wilcoxon test for P prompts is 2 / 2^P: of fewer, nothing can be below 0.05.
FEWEST_PROMPTS = 6


@dataclass(frozen=True)
class RewardComparison:
    """One reward of a tuned model against its base.

    Attributes:
        role: `trained` or `held-out`; "" if it isn't known what the model was trained on.
        overall: comparison over all prompts.
        categories: comparison by value of each category column; gains in the unit of `overall`.
    """

    role: str
    overall: Comparison
    categories: dict[str, dict[str, Comparison]]


@dataclass(frozen=True)
class AgainstBase:
    """A tuned model against the base with the same sampler, images paired by noise.

    Attributes:
        base: key of that base.
        rewards: comparisons by reward name.
        diversity_kept: by name of the features, diversity tuned / base, >= 0; left out where all base
            images of a prompt are alike.
        frechet: by name of the features, squared distance of the images as a set, in squared features.
        path_kl: KL divergence of the tuned from the base path law, in nats an image; None without an SDE.
        change: mean LPIPS distance to the base image of the same noise, >= 0; None if it wasn't measured.
        tilt: comparison with what its run aimed at; None without path KL, or where the run isn't known.
    """

    base: str
    rewards: dict[str, RewardComparison]
    diversity_kept: dict[str, Estimate]
    frechet: dict[str, FrechetFromBase]
    path_kl: Estimate | None
    change: Estimate | None
    tilt: TiltComparison | None


@dataclass(frozen=True)
class CandidateSummary:
    """Summary of one model that made images.

    Attributes:
        key: key of the candidate, unique in the evaluation.
        name: `base`, or the name of the LoRA.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance, 1.0 = off.
        lora: path of the LoRA; None = the base.
        lora_scale: strength of the LoRA.
        scores: mean score by reward name, in the reward's units, higher is better.
        diversity: by name of the features, mean pairwise 1 - cos of the images of a prompt, in [0, 2]; left
            out with one image per prompt.
        reference: by name of the features, squared Frechet distance of all images to the reference ones.
            Biased upwards alike for all candidates of an evaluation: compare them, don't read the size.
        against_base: comparison with the base; None for a base.
    """

    key: str
    name: str
    num_inference_steps: int
    guidance_scale: float
    lora: str | None
    lora_scale: float
    scores: dict[str, Estimate]
    diversity: dict[str, Estimate]
    reference: dict[str, float]
    against_base: AgainstBase | None


@dataclass(frozen=True)
class Summary:
    """Findings of an evaluation.

    Attributes:
        format: version of the file.
        fingerprint: fingerprint of settings, prompts and images per prompt: if it agrees, evaluations are
            comparable in the rewards that they have from the same weights.
        settings: what the images depend on beside prompts and candidates.
        num_prompts: P.
        images_per_prompt: S, of each candidate.
        prompts_sha256: SHA-256 of the prompts in their order.
        categories: number of prompts of each value, by category column.
        candidates: bases first.
        reward_models: where each reward's weights are, by reward name; None = it has none.
        notes: what a reader must know of prompts and LoRAs: leaks, repetitions, cut-off prompts.
    """

    format: Literal[2]
    fingerprint: str
    settings: dict[str, object]
    num_prompts: int
    images_per_prompt: int
    prompts_sha256: str
    categories: dict[str, dict[str, int]]
    candidates: list[CandidateSummary]
    reward_models: dict[str, str | None]
    notes: list[str]

    def __post_init__(self) -> None:
        known = {candidate.key for candidate in self.candidates}
        for candidate in self.candidates:
            if candidate.against_base is not None and candidate.against_base.base not in known:
                raise ValueError(f"{candidate.key} is compared with {candidate.against_base.base}: not there")

    def base_of(self, candidate: CandidateSummary) -> CandidateSummary:
        """Return the candidate that a candidate is compared with; itself for a base."""
        base = candidate.key if candidate.against_base is None else candidate.against_base.base
        return next(other for other in self.candidates if other.key == base)

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards, as they were asked for."""
        return list(dict.fromkeys(name for candidate in self.candidates for name in candidate.scores))


_READER = TypeAdapter(Summary)


def fingerprint_of(settings: Mapping[str, object], prompts: PromptSet, images_per_prompt: int) -> str:
    """Return 16 hexadecimal digits that two evaluations share if they drew the same base images."""
    # The same prompts may come from two places.
    drawn = {name: value for name, value in settings.items() if name != "prompt_source"}
    return _sha256([drawn, prompts.prompts, images_per_prompt])[:16]


def prompts_sha256(prompts: PromptSet) -> str:
    """Return the SHA-256 of the prompts in their order."""
    return _sha256(prompts.prompts)


def _sha256(data: object) -> str:
    return sha256_of_text(json.dumps(data, sort_keys=True, allow_nan=False, ensure_ascii=False))


def write_summary(summary: Summary, file: Path) -> None:
    """Write a summary as JSON, whole or not at all; secrets in paths are redacted.

    Raises:
        ValueError: if a number isn't finite.
        OSError: if the file can't be written; the one before stays.
    """
    document = redact_values(asdict(summary))
    write_text(file, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_summary(file: Path) -> Summary:
    """Read what `write_summary` wrote.

    Raises:
        ValueError: if the file can't be read or isn't a summary; says where it is wrong first.
    """
    try:
        return _READER.validate_python(json.loads(file.read_text("utf-8"), parse_constant=_no_number))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file} isn't a summary of this version: {where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}; evaluate.py writes it again") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} in it")
