"""Validation during training, and held-out evaluation at the end."""

from dataclasses import dataclass, field
from typing import Literal

from am_diffusers.config.rewards import RewardConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation and held-out evaluation (ODE sampling, the same noise for base and tuned).

    Attributes:
        validation_prompts: prompts of the base-vs-tuned grids; empty = the first four evaluation (else
            training) prompts.
        num_validation_prompts: prompts whose images are scored at each validation: first those of the grids,
            then evaluation (else training) prompts drawn at random up to this number.
        num_validation_images: images per prompt at each validation, each with its own fixed noise.
        validation_steps: iterations between two validations.
        certificate_images: base images a prompt by the chain of training, of which the validation prompts'
            tell how far the run is from the tilt, and training prompts' what reward_scale auto is; 0 = no
            certificate.
        frontier: file of base scores that calibrate_rewards.py wrote, for reward_scale auto, relative to the
            current folder like all paths in configs; null = the run scores base images of its own.
        early_stopping_patience: end the run after this number of validations in a row without a new best
            early_stopping_metric; null = never.
        early_stopping_metric: gain of the first held-out reward, or tilt_gap: the distance from the tilt.
        eval_prompts: held-out prompts, a source like `train_prompts`, for instance DrawBench; null = no
            evaluation at the end.
        eval_prompts_column: column (or JSON key) that holds the prompt; not used by txt files.
        eval_prompts_split: split of a data set folder or hub data set.
        max_eval_prompts: number of evaluation prompts to use, the first ones; null = all.
        eval_images_per_prompt: images per prompt for base and tuned each, at least 2 for diversity.
        eval_rewards: held-out rewards; null = pickscore when hpsv2 is trained, hpsv2 otherwise.
        eval_inference_steps: denoising steps of the ODE sampler in validation and evaluation.
        eval_guidance_scale: classifier-free guidance of base and tuned in validation and evaluation,
            at least 1; 1.0 = off.
        eval_batch_size: images sampled, decoded and scored at a time on each process.
    """

    validation_prompts: list[str] = field(default_factory=list)
    num_validation_prompts: int = 16
    num_validation_images: int = 2
    validation_steps: int = 50
    certificate_images: int = 64
    frontier: str | None = None
    early_stopping_patience: int | None = None
    early_stopping_metric: Literal["gain", "tilt_gap"] = "gain"
    eval_prompts: str | None = None
    eval_prompts_column: str = "prompt"
    eval_prompts_split: str = "test"
    max_eval_prompts: int | None = None
    eval_images_per_prompt: int = 4
    eval_rewards: list[RewardConfig] | None = None
    eval_inference_steps: int = 28
    eval_guidance_scale: float = 1.0
    eval_batch_size: int = 16
