"""The run: where it writes and how it starts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Attributes:
        output_dir: folder of everything the run writes; created if needed. A run that left checkpoints in
            it goes on, the results of one that didn't are replaced.
        seed: all randomness of the run is a function of it.
        report_to: tracker beside metrics.jsonl, which is always written.
        logging_dir: folder of the tracker's files, inside output_dir.
        allow_tf32: let CUDA multiply float32 matrices in TF32.
        push_to_hub: upload LoRA, model card, pictures and settings to the Hugging Face hub after the run; the
            token is that of `hf auth login` or HF_TOKEN, checked before the run.
        hub_model_id: where to upload, owner/name, or name in one's own namespace; null = name of output_dir.
        hub_private_repo: make the repository private, if it isn't there yet.
        gpu: graphics card for which `dry_run` estimates hours and says whether the run fits, e.g. H100;
            null = none.
        dry_run: print the resolved plan with estimates of memory, FLOPs and hours, and exit.
    """

    output_dir: str
    seed: int = 0
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    logging_dir: str = "logs"
    allow_tf32: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    gpu: str | None = None
    dry_run: bool = False
