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
        dry_run: print the resolved plan and exit.
    """

    output_dir: str
    seed: int = 0
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    logging_dir: str = "logs"
    allow_tf32: bool = False
    dry_run: bool = False
