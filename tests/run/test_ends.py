"""The end of a stopped command: its process group is down, its status is the signal's."""

import runpy
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from am_diffusers.system.signals import Interrupted
from finetune_runs import FINETUNE

ROOT = FINETUNE.parents[1]
FLAGS = {
    "scripts/finetune.py": ["--config", str(ROOT / "configs/tiny_sd3.yaml"), "--report_to", "none"],
    "eval/evaluate.py": [
        *("--pretrained_model_name_or_path", "asset:tiny_sd3", "--prompts", "tiny"),
        *("--rewards", "brightness", "--output_dir", "out"),
    ],
}


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs a command whose work, after its plan, raises an error."""

    def run(name, error):
        def work(*_):
            raise error

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *FLAGS[name]])
        built = SimpleNamespace(execute=work)
        monkeypatch.setattr("am_diffusers.run.build.build", lambda *_: built)
        monkeypatch.setattr("evaluating.driver.evaluate", work)
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / name))["main"]()
        return left.value.code

    return run


@pytest.mark.parametrize("name", FLAGS)
def test_a_stopped_command_takes_its_process_group_down(group, command, name):
    assert command(name, Interrupted(signal.SIGTERM)) == 128 + signal.SIGTERM
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_an_evaluation_without_memory_says_what_to_set(command, error):
    assert "out of memory: pass a smaller --batch_size" in command("eval/evaluate.py", error)


def test_other_errors_of_an_evaluation_are_shown_as_ever(command):
    with pytest.raises(RuntimeError, match="bug"):
        command("eval/evaluate.py", RuntimeError("bug"))
