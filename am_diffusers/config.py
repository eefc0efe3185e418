"""What a run is told: frozen dataclasses, one sentence a field, read by `command_line.py` (YAML and flags).

Flag and YAML key are the field's name, without the section; names follow the Diffusers training scripts.
Paths may start with `asset:`, a file shipped with the package (`asset:tiny_sd3`).
Config objects stop at `build.py`; nothing below it knows them.
"""

from dataclasses import dataclass, field
from typing import Literal

LrSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


@dataclass(frozen=True)
class RewardConfig:
    """One learned reward.

    Attributes:
        name: which reward, a key of `am_diffusers.rewards.REWARDS`, e.g. pickscore or hpsv2.
        model: folder, file, `asset:` path, hub id or `package:` of its weights; null = the released ones.
        revision: branch, tag or commit of a hub model; null = its main branch.
        sha256: of its weight file, checked before it is read; null = the pinned one if there is one.
        weight: factor of this reward in the trained sum, in 1 / its own units; scores are reported without.
        mixed_precision: dtype of its towers (no = float32); scores are computed from features in float32.
        batch_size: pictures a pass; null = reward_micro_batch_size.
        device: where it runs, e.g. cuda:1; null = the process's own device.
    """

    name: str
    model: str | None = None
    revision: str | None = None
    sha256: str | None = None
    weight: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    batch_size: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Model and adapter.

    Attributes:
        pretrained_model_name_or_path: Diffusers folder, `asset:` path or hub id of an SD3 pipeline.
        revision: branch, tag or commit of a hub model; null = its main branch.
        variant: weight file variant of the model, e.g. fp16; null = none.
        resolution: side of the square pictures trained and evaluated on, in pixels.
        max_sequence_length: length of the T5 part of the prompt, in tokens; the same everywhere.
        rank: LoRA rank, the inner dimension of each adapter.
        lora_alpha: LoRA alpha; the adapter is scaled by lora_alpha / rank.
        lora_layers: names of the adapted linear layers; null = the eight attention projections of MMDiT.
        mixed_precision: dtype of the frozen transformer (no = float32); LoRA, VAE and rewards stay float32.
        gradient_checkpointing: recompute activations of transformer, VAE and reward towers in backward
            passes to save memory.
        free_text_encoders: encode all prompts before training and free the text encoders' memory; false
            keeps the encoders and encodes each prompt when it comes up.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    resolution: int = 512
    max_sequence_length: int = 256
    rank: int = 32
    lora_alpha: int = 64
    lora_layers: list[str] | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    free_text_encoders: bool = True


@dataclass(frozen=True)
class PromptConfig:
    """Training prompts.

    Attributes:
        train_prompts: txt, jsonl, json, csv, tsv or parquet file, data set folder, `asset:` path or hub id.
        train_prompts_column: column (or JSON key) that holds the prompt; not used by txt files.
        train_prompts_split: split of a data set folder or hub data set.
        max_train_prompts: use only the first so many prompts; null = all.
    """

    train_prompts: str
    train_prompts_column: str = "prompt"
    train_prompts_split: str = "train"
    max_train_prompts: int | None = None


@dataclass(frozen=True)
class MethodConfig:
    """Method and rewards.

    Attributes:
        rewards: the trained rewards; their weighted sum is maximised.
        method: fine-tuning method, a key of `am_diffusers.methods.METHODS`.
        num_inference_steps: denoising steps K of a training rollout, at least 2.
        transitions: stochastic table of the rollout (see `am_diffusers.transitions`).
        pairing: which adjoint belongs to a step (MATH: right is the optimum of the discrete chain).
        adjoint: lean (base Jacobian only) or full (with the policy's Jacobian; for study, costs more).
        reward_scale: factor lambda of the reward in exp(lambda * r), in 1 / reward units.
        loss_steps: denoising steps an iteration trains on: all, or a number, at most K - 1 (half of them
            the last ones with noise, the others drawn at random).
        mask_quantile: share in (0, 1) of the rows of a step to keep, those of largest residual are left
            out of the loss; null = keep all.
        sigma_jitter: share in [0, 0.5) of a step by which interior sigmas move at random each iteration.
        rollout_guidance_scale: classifier-free guidance of the training rollout; 1.0 = off (grounded).
    """

    rewards: list[RewardConfig]
    method: str = "adjoint_matching"
    num_inference_steps: int = 20
    transitions: Literal["memoryless_local_linear", "memoryless_euler", "ancestral"] = (
        "memoryless_local_linear"
    )
    pairing: Literal["right", "left", "trapezoid"] = "right"
    adjoint: Literal["lean", "full"] = "lean"
    reward_scale: float = 1.0
    loss_steps: int | Literal["all"] = "all"
    mask_quantile: float | None = 0.9
    sigma_jitter: float = 0.0
    rollout_guidance_scale: float = 1.0


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation.

    Attributes:
        train_batch_size: trajectories an iteration in total, over all processes.
        max_train_steps: iterations (optimizer steps) of the run.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler: schedule by iteration, a name of `diffusers.optimization.get_scheduler`.
        lr_warmup_steps: iterations of linear warm-up.
        adam_beta1: decay of the gradient's running mean.
        adam_beta2: decay of the squared gradient's running mean.
        adam_epsilon: AdamW's epsilon.
        adam_weight_decay: decoupled weight decay of the LoRA weights.
        max_grad_norm: gradients are scaled down to this global norm.
        rollout_micro_batch_size: samples a transformer call of rollout and adjoint; null = all of a process.
        reward_micro_batch_size: samples a VAE and reward pass; null = all of a process.
        loss_micro_batch_size: (sample, step) rows a forward and backward of the loss.
    """

    train_batch_size: int = 16
    max_train_steps: int = 1000
    learning_rate: float = 3e-4
    lr_scheduler: LrSchedule = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rollout_micro_batch_size: int | None = None
    reward_micro_batch_size: int | None = None
    loss_micro_batch_size: int = 16


@dataclass(frozen=True)
class EvaluationConfig:
    """Grids and held-out evaluation (ODE sampling, the same noise for base and tuned).

    Attributes:
        validation_prompts: prompts of the base-vs-tuned grids; empty = the first four evaluation (else
            training) prompts.
        num_validation_images: pictures a prompt in the grids, each with its own fixed noise.
        validation_steps: iterations between two grids.
        eval_prompts: held-out prompts, a source like `train_prompts`; null = no evaluation at the end.
        eval_prompts_column: column (or JSON key) that holds the prompt; not used by txt files.
        eval_prompts_split: split of a data set folder or hub data set.
        max_eval_prompts: use only the first so many evaluation prompts; null = all.
        eval_images_per_prompt: pictures a prompt for base and tuned each, at least 2 for diversity.
        eval_rewards: held-out rewards; null = pickscore when hpsv2 is trained, hpsv2 otherwise.
        eval_inference_steps: denoising steps of the ODE sampler in grids and evaluation.
        eval_guidance_scale: classifier-free guidance of base and tuned in grids and evaluation; 1.0 = off.
        eval_batch_size: pictures sampled, decoded and scored at a time on each process.
    """

    validation_prompts: list[str] = field(default_factory=list)
    num_validation_images: int = 2
    validation_steps: int = 50
    eval_prompts: str | None = None
    eval_prompts_column: str = "prompt"
    eval_prompts_split: str = "test"
    max_eval_prompts: int | None = None
    eval_images_per_prompt: int = 4
    eval_rewards: list[RewardConfig] | None = None
    eval_inference_steps: int = 28
    eval_guidance_scale: float = 1.0
    eval_batch_size: int = 16


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Attributes:
        output_dir: folder of everything the run writes; created if needed, an earlier run's results in
            it are replaced.
        seed: all randomness of the run is a function of it.
        report_to: tracker beside metrics.jsonl, which is always written.
        logging_dir: folder of the tracker's files, inside output_dir.
        allow_tf32: let CUDA multiply float32 matrices in TF32.
        dry_run: print the resolved plan and exit.
    """

    output_dir: str
    seed: int = 0
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    logging_dir: str = "logs"
    allow_tf32: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Config:
    """All sections of a run; see each section's docstring."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
