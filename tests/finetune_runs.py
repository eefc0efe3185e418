"""Small runs of the finetune script on random models, for the tests of the trainer and the scripts."""

import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import yaml

from reward_models import save_hpsv2, save_pickscore

FINETUNE = Path(__file__).parents[1] / "scripts/finetune.py"


def write_rewards(folder: Path) -> None:
    """Random reward models `folder/pickscore` and `folder/hpsv2`."""
    save_pickscore(folder / "pickscore")
    save_hpsv2(folder / "hpsv2")


def tiny_config(model: Path, folder: Path, **changes: object) -> Path:
    """Config file of a run that takes a second: 4 iterations of 4 samples and 4 steps.

    Args:
        model: folder of a pipeline.
        folder: where `write_rewards` wrote, and where config, prompts and outputs go.
        **changes: keys of the config to set.
    """
    (folder / "train.txt").write_text("a red apple\na small green frog\nthe yellow moon\n")
    (folder / "eval.txt").write_text("an orange fox\na green frog\nthe grey sea\n")
    config = {
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(folder / "out"),
        "resolution": 64,
        "max_sequence_length": 8,
        "rank": 4,
        "lora_alpha": 8,
        "train_prompts": str(folder / "train.txt"),
        "rewards": [{"name": "pickscore", "model": str(folder / "pickscore")}],
        "num_inference_steps": 4,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "validation_steps": 2,
        "eval_prompts": str(folder / "eval.txt"),
        "eval_rewards": [{"name": "hpsv2", "model": str(folder / "hpsv2")}],
        "eval_inference_steps": 3,
        "eval_images_per_prompt": 2,
        "eval_batch_size": 4,
        "certificate_images": 8,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def finetune(arguments: list[str], log: Path) -> None:
    """The script's main in this process, with both outputs appended to `log`; for processes of tests."""
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(FINETUNE), *arguments]
    runpy.run_path(str(FINETUNE), run_name="__main__")


def start(arguments: list[str], log: Path) -> ForkServerProcess:
    """Start `finetune.py` in a process of its own, with the imports done already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["am_diffusers.run.build", "datasets"])
    process = context.Process(target=finetune, args=(arguments, log))
    process.start()
    return process


def wait_for(condition: Callable[[], object], process: ForkServerProcess, seconds: float = 120) -> None:
    """Poll until `condition()`, or the process ends; the test fails after so many seconds."""
    give_up = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.005)
