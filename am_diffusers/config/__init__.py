"""What a run is told: frozen dataclasses, one sentence a field, read by `command_line.py` (YAML and flags).

Flag and YAML key are the field's name, without the section; names follow the Diffusers training scripts.
Paths may start with `asset:`, a file shipped with the package (`asset:tiny_sd3`).
Config objects stop at `run/`; nothing below it knows them.
"""

from dataclasses import dataclass

from am_diffusers.config.baselines import BaselinesConfig
from am_diffusers.config.buffer import BufferConfig
from am_diffusers.config.deterministic_adjoint_matching import DeterministicConfig
from am_diffusers.config.efficient_adjoint_matching import EfficientConfig
from am_diffusers.config.evaluation import EvaluationConfig
from am_diffusers.config.method import MethodConfig
from am_diffusers.config.model import ModelConfig, PromptConfig
from am_diffusers.config.optimizer import LrSchedule, OptimizerConfig
from am_diffusers.config.rewards import RewardConfig, TerminalConfig
from am_diffusers.config.run import CheckpointConfig, RunConfig

__all__ = [
    "BaselinesConfig",
    "BufferConfig",
    "CheckpointConfig",
    "Config",
    "DeterministicConfig",
    "EfficientConfig",
    "EvaluationConfig",
    "LrSchedule",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptConfig",
    "RewardConfig",
    "RunConfig",
    "TerminalConfig",
]


@dataclass(frozen=True)
class Config:
    """All sections of a run; see each section's docstring."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptConfig
    method: MethodConfig
    terminal: TerminalConfig
    buffer: BufferConfig
    efficient: EfficientConfig
    deterministic: DeterministicConfig
    baselines: BaselinesConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
