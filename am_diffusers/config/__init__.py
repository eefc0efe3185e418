"""Flags of a run: frozen dataclasses, one sentence a field, read by `command_line.py` (YAML and flags).

Flag and YAML key are the field's name, without the section; names follow the Diffusers training scripts.
Paths may start with `asset:`, a file shipped with the package (`asset:tiny_sd3`). A method's own flags are
its `Settings`, in its file: `Config.own` holds the flags of all methods, so that a flag of another one is
refused by name. Config objects stop at `run/`; nothing below it knows them.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from am_diffusers.config.evaluation import EvaluationConfig
from am_diffusers.config.method import MethodConfig
from am_diffusers.config.model import ModelConfig, PromptConfig
from am_diffusers.config.optimizer import LrSchedule, OptimizerConfig
from am_diffusers.config.rewards import RewardConfig
from am_diffusers.config.run import CheckpointConfig, RunConfig
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.settings import SharedSettings

__all__ = [
    "CheckpointConfig",
    "Config",
    "EvaluationConfig",
    "LrSchedule",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptConfig",
    "RewardConfig",
    "RunConfig",
    "SharedSettings",
    "section_types",
]


@dataclass(frozen=True)
class Config:
    """All sections of a run, in the order of the flags; see each section's docstring.

    Attributes:
        own: the flags of each method, by its name.
    """

    run: RunConfig
    model: ModelConfig
    prompts: PromptConfig
    method: MethodConfig
    shared: SharedSettings
    own: Mapping[str, Any]
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig

    @property
    def settings(self) -> Any:
        """The chosen method's own flags."""
        return self.own[self.method.method]

    def sections(self) -> dict[str, Any]:
        """Return all sections by name, with the methods' sections."""
        return {name: self.own[name] if name in self.own else getattr(self, name) for name in section_types()}

    def flags(self) -> dict[str, Any]:
        """Return the value of every flag, in the order of the flags."""
        return {name: value for section in self.sections().values() for name, value in vars(section).items()}


def section_types() -> dict[str, type]:
    """Return the classes of all sections by name; a flag may be in the sections of several methods."""
    found: dict[str, type] = {}
    for name, kind in typing.get_type_hints(Config).items():
        found |= {n: method.Settings for n, method in METHODS.items()} if name == "own" else {name: kind}
    return found
