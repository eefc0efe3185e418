"""The run: its output folder, trackers, upload, and checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Attributes:
        output_dir: folder of everything the run writes; created if needed. A run that left checkpoints in
            it is resumed. Without checkpoints, a folder with a finished run or with files that would be
            replaced and aren't a run's is refused.
        overwrite_output_dir: replace such results and files, when the training begins and the new ones
            stand; checkpoints are resumed all the same.
        seed: seed of all randomness of the run, from 0 to 2**63 - 1.
        report_to: tracker beside metrics.jsonl, which is always written.
        logging_dir: folder of the tracker's files, inside output_dir: each run has its own.
        allow_tf32: let CUDA take float32 matrix products and convolutions (VAE, rewards) in TF32.
        push_to_hub: upload LoRA, model card, images and settings to the Hugging Face hub after the run; the
            token of `hf auth login` or HF_TOKEN is checked before the run.
        hub_model_id: where to upload, owner/name, or name in one's own namespace; null = name of output_dir.
        hub_private_repo: make the repository private, if it isn't there yet.
        gpu: graphics card for which `dry_run` estimates hours and says whether the run fits, e.g. H100;
            null = none.
        dry_run: print the resolved plan with estimates of memory, FLOPs and hours, and exit.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    seed: int = 0
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    logging_dir: str = "logs"
    allow_tf32: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    gpu: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Attributes:
        checkpointing_steps: iterations between two checkpoints; there is always one at the end, and when
            the run is stopped by SIGTERM, SIGINT or SIGUSR1.
        checkpoints_total_limit: checkpoints to keep, the oldest go first; null = all.
        resume_from_checkpoint: latest = the newest in output_dir that is sound, else a fresh start; or
            the path of a checkpoint, or its name in output_dir.
        allow_config_change: resume although settings differ that change what is trained; the differences are
            printed. Rows that a method keeps (a buffer, grpo_passes) are dropped if reward, reward_scale,
            train_batch_size, the prompts or another setting that they were made with differs; thresholds of
            the mask and other running means start anew if the target of the training has changed.
        on_full_disk: stop the run when a checkpoint can't be written, or skip that checkpoint.
    """

    checkpointing_steps: int = 50
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str = "latest"
    allow_config_change: bool = False
    on_full_disk: Literal["stop", "skip"] = "stop"
