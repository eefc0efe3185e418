"""A study: the settings that are compared, what is held equal, and how the results are evaluated.

Declared in a YAML file beside this one before anything runs, so that settings aren't chosen by the results.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from am_diffusers.config import RewardConfig
from am_diffusers.rewards import RewardScale

STRICT = ConfigDict(extra="forbid")
MOST_SETTINGS = 3
Flag = bool | int | float | str | list[dict[str, str | float]] | list[str]


@dataclass(frozen=True)
class Mark:
    """A point of a run at which its LoRA is kept and evaluated; one of the three is given.

    Attributes:
        seconds: CPU seconds of training; loading, saving and evaluating don't count.
        calls: transformer calls, with or without a backward pass, counted per sample.
        iterations: optimizer steps.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    seconds: float | None = None
    calls: int | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.seconds, self.calls, self.iterations)) != 1:
            raise ValueError("a mark has exactly one of seconds, calls and iterations: remove or add one")

    @property
    def name(self) -> str:
        """Name of the mark, as shown, and of the LoRA's folder."""
        if self.seconds is not None:
            return f"{self.seconds:g}-s"
        return f"{self.calls}-calls" if self.calls is not None else f"{self.iterations}-iterations"

    def passed(self, seconds: float, calls: float, iterations: int) -> bool:
        """Return whether a run has reached the mark."""
        if self.seconds is not None:
            return seconds >= self.seconds
        return calls >= self.calls if self.calls is not None else iterations >= (self.iterations or 0)


@dataclass(frozen=True)
class CertificateOptions:
    """One memoryless chain for all, whichever a method trains by.

    Attributes:
        num_inference_steps: steps of the chain, the last one the base's.
        num_prompts: number of the evaluation's prompts.
        base_images: images of the base a prompt, at least 8, which tell what the tilt is.
        images: images of a LoRA a prompt, at most as many.
        reward_scale: scale of the tilt that all are compared with.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_inference_steps: int
    num_prompts: int
    base_images: int
    images: int
    reward_scale: float


@dataclass(frozen=True)
class EvaluationOptions:
    """One sampler for all, the model's ODE without guidance, and one chain.

    Attributes:
        prompts: prompts of the images, captions of the embedded world; none of them is trained on.
        rewards: trained and held-out.
        num_inference_steps: Euler steps.
        num_images_per_prompt: images per prompt, at least 2.
        certificate: chain that tells the distance from the tilt.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prompts: str
    rewards: list[str]
    num_inference_steps: int
    num_images_per_prompt: int
    certificate: CertificateOptions


@dataclass(frozen=True)
class Elsewhere:
    """A setting of another study, with the same evaluation."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    study: str
    setting: str


@dataclass(frozen=True)
class Study:
    """Declaration of a study.

    Attributes:
        description: one sentence.
        marks: when LoRAs are evaluated; a run ends when all are passed.
        budget: name of the mark at which settings are compared.
        seeds: seeds of training; settings are chosen on the first.
        select: best = of each method the setting that is best on the first seed is run on all; all = all are.
        common: flags of finetune.py for all settings.
        settings: further flags by name of the setting; `method` is in `common` or here.
        evaluation: the same for all.
        reference: setting to compare with at equal trained reward, beside the first method's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    description: str
    marks: list[Mark]
    budget: str
    seeds: list[int]
    select: Literal["best", "all"]
    common: dict[str, Flag]
    settings: dict[str, dict[str, Flag]]
    evaluation: EvaluationOptions
    reference: Elsewhere | None = None

    def __post_init__(self) -> None:
        if self.budget not in {mark.name for mark in self.marks}:
            raise ValueError(f"budget {self.budget}: expected one of {[mark.name for mark in self.marks]}")
        if self.select == "best":
            for method, names in self.methods.items():
                if len(names) > MOST_SETTINGS:
                    raise ValueError(f"{method} has {len(names)} settings, at most {MOST_SETTINGS} are tried")

    @property
    def methods(self) -> dict[str, list[str]]:
        """Names of the settings of each method, in the order of the file."""
        found: dict[str, list[str]] = {}
        for name, flags in self.settings.items():
            found.setdefault(str((self.common | flags)["method"]), []).append(name)
        return found

    @property
    def timed(self) -> bool:
        """True if runs are compared by the time they take, so that their seconds mean something."""
        return any(mark.seconds is not None for mark in self.marks)

    @property
    def trained(self) -> dict[str, RewardScale]:
        """Scales of the trained rewards in their sum, by name; they are the same for all settings."""
        rewards = TypeAdapter(list[RewardConfig]).validate_python(self.common["rewards"])
        return {each.name: RewardScale(each.weight, each.mean, each.std) for each in rewards}

    def flags(self, setting: str) -> dict[str, Flag]:
        """Return all flags of a setting."""
        return self.common | self.settings[setting]


def read_study(file: Path) -> Study:
    """Read a study's file.

    Raises:
        ValueError: if it can't be read or isn't a study; says where it is wrong first.
    """
    try:
        return TypeAdapter(Study).validate_python(yaml.safe_load(file.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file}: {where}: {first['msg']}") from error
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error


def command_line(flags: Mapping[str, Flag]) -> list[str]:
    """Return flags as `finetune.py` takes them, lists and switches in YAML's flow style."""
    words: list[str] = []
    for name, value in flags.items():
        plain = (
            value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=9999)
        )
        words += [f"--{name}", plain.removesuffix("\n").removesuffix("\n...")]
    return words
