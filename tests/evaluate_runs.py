"""Small evaluations on random models, for the tests of `eval/`."""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from am_diffusers.models.base import Model
from am_diffusers.models.pretrained import Pretrained
from finetune_runs import write_rewards

EVALUATE = Path(__file__).parents[1] / "eval/evaluate.py"
PROMPTS = (
    "prompt,category\nan orange fox,animals\na green frog,animals\nthe grey sea,places\na red clock,things\n"
)


def write_lora(model: Path | str, folder: Path, *, seed: int = 0, size: float = 0.5) -> Path:
    """A LoRA far from zero for the model, in `folder`."""
    sd3 = Model.from_pretrained(Pretrained(str(model)))
    sd3.attach_lora(rank=4, lora_alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sd3.lora_parameters().items():
        if ".lora_B." in name:
            scale = size / parameter.shape[1] ** 0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return sd3.save_lora(folder)


def prepare(model: Path, folder: Path) -> None:
    """Random rewards, prompts with categories and a LoRA in `folder`."""
    write_rewards(folder)
    (folder / "prompts.csv").write_text(PROMPTS)
    write_lora(model, folder / "lora")


def arguments(model: Path | str, folder: Path, name: str, *more: str) -> list[str]:
    """Command line of an evaluation of seconds into `folder / name`: 4 prompts x 5 pictures x 2 models."""
    return [
        *("--pretrained_model_name_or_path", str(model)),
        *("--lora_path", str(folder / "lora")),
        *("--prompts", str(folder / "prompts.csv")),
        *("--rewards", f"pickscore={folder / 'pickscore'}", f"hpsv2={folder / 'hpsv2'}"),
        *("--num_images_per_prompt", "5"),
        *("--num_inference_steps", "3"),
        *("--max_sequence_length", "8"),
        *("--resolution", "64"),
        *("--output_dir", str(folder / name)),
        *more,
    ]


def evaluate(argv: list[str], log: Path) -> None:
    """The script's main in this process, with both outputs appended to `log`; for processes of tests."""
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(EVALUATE.parent))
    sys.argv = [str(EVALUATE), *argv]
    runpy.run_path(str(EVALUATE), run_name="__main__")


def start(argv: list[str], log: Path) -> ForkServerProcess:
    """Start `evaluate.py` in a process of its own, with the slow imports done already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["am_diffusers.run.build", "datasets", "matplotlib.pyplot"])
    process = context.Process(target=evaluate, args=(argv, log))
    process.start()
    return process


def run(argv: list[str], log: Path) -> str:
    """Run `evaluate.py` to its end; what it printed."""
    process = start(argv, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    return log.read_text()
