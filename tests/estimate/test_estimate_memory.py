"""The estimated memory against that of a real iteration on the CPU: growth of the peak of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate import estimate
from am_diffusers.estimate.passes import LOSS, REWARD
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan

MEASURE = Path(__file__).parents[1] / "memory_run.py"
SMALL = {"train_batch_size": 1, "loss_micro_batch_size": 1}
# Hundreds of megabytes of activations, in different phases.
RUNS = {
    REWARD: {"train_batch_size": 32, "loss_micro_batch_size": 48, "reward_micro_batch_size": 24},
    LOSS: {
        "train_batch_size": 32,
        "loss_micro_batch_size": 64,
        "rollout_micro_batch_size": 4,
        "reward_micro_batch_size": 2,
        "gradient_checkpointing": True,
        "resolution": 128,
    },
    f"{LOSS}, draft": {
        "method": "draft",
        "draft_steps": 2,
        "train_batch_size": 32,
        "loss_micro_batch_size": 32,
        "reward_micro_batch_size": 4,
        "resolution": 128,
    },
}


def write_config(folder: Path, name: str, changes: dict[str, object]) -> Path:
    """A run of the embedded models, without evaluation."""
    (folder / "train.txt").write_text("an apple on a blue background\na frog on a red background\na moon\n")
    config = {
        "pretrained_model_name_or_path": "asset:tiny_sd3",
        "output_dir": str(folder / name),
        "resolution": 64,
        "max_sequence_length": 4,
        "train_prompts": str(folder / "train.txt"),
        "rewards": [{"name": "pickscore", "model": "asset:tiny_pickscore"}],
        "num_inference_steps": 3,
        "report_to": "none",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("phase", RUNS)
def test_the_estimate_is_within_15_percent_of_the_growth_of_a_process(tmp_path: Path, phase: str) -> None:
    small, large = (
        write_config(tmp_path, name, changes) for name, changes in (("small", SMALL), ("large", RUNS[phase]))
    )
    # Larger blocks are mapped, so freeing one shrinks the process: what the allocator keeps isn't measured.
    alone = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, MEASURE, small, large],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    config = parse_config(["--config", str(large)])
    found = estimate(make_plan(config, 1), make_accelerator(config), on_gpu=False)
    assert found.highest == phase.split(",")[0]
    assert measured["peak"] > 3 * measured["loaded"], "activations dominate"
    assert measured["peak"] > 300e6
    assert found.peak == pytest.approx(measured["peak"], rel=0.15)
