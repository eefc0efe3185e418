"""A card that CUDA can't use: every command says so and stops, unless the CPU was asked for.

What is made up is the hardware alone: files of cards, an `nvidia-smi` that answers, whether CUDA starts.
"""

import runpy
import sys

import pytest
import torch

from am_diffusers.system import device
from finetune_runs import FINETUNE

ROOT = FINETUNE.parents[1]
VARIABLES = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that shows a machine: what nvidia-smi prints (None = not installed), its card's file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(device, "DEVICES", tmp_path / "dev")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def show(smi=None, card=None, status=0):
        if smi is not None:
            file = tmp_path / "bin/nvidia-smi"
            file.write_text(f"#!/bin/sh\necho '{smi}'\nexit {status}\n")
            file.chmod(0o755)
        if card is not None:
            (tmp_path / "dev" / card).touch()

    return show


OLD = r"CUDA 13.0, which needs driver 580 or newer, and here is 550.54.15 .*whl/cu126 .*USE_CPU=true"


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"smi": "550.54.15", "card": "nvidia0"}, OLD),
        ({"smi": "550.54.15", "card": "nvidia3"}, OLD),
        ({"smi": "550.54.15"}, OLD),  # WSL has no such file
        ({"card": "nvidia0"}, r"driver 580 or newer, and here is none that answers .*whl/cu126"),
        ({"smi": MISMATCH, "card": "nvidia0", "status": 18}, r"here is none that answers"),
        ({"smi": "580.65.06", "card": "nvidia0"}, r"here is 580.65.06 .*new enough: restart the machine"),
    ],
)
def test_a_card_that_cuda_cannot_use_is_refused(machine, shown, message):
    machine(**shown)
    with pytest.raises(ValueError, match=message) as caught:
        device.check_card()
    assert "\n" not in str(caught.value)
    assert ("cu126" in str(caught.value)) != ("restart" in str(caught.value))


def test_drivers_are_those_of_the_major_version(machine, monkeypatch):
    machine("470.82.01", "nvidia0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ValueError, match=r"CUDA 12\.8, which needs driver 525 or newer"):
        device.find_device()


@pytest.mark.parametrize("shown", [{}, {"smi": "No devices were found", "status": 6}, {"card": "nvidiactl"}])
def test_a_machine_without_a_card_takes_the_cpu(machine, shown):
    machine(**shown)
    assert device.find_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_CPU", "true"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("ACCELERATE_TORCH_DEVICE", "cpu"),
    ],
)
@pytest.mark.parametrize("usable", [False, True])
def test_the_cpu_may_be_asked_for(machine, monkeypatch, name, value, usable):
    machine("550.54.15", "nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setenv(name, value)
    assert device.find_device() == torch.device("cpu")


def test_a_card_that_works_is_taken_and_one_that_torch_is_not_built_for_is_left(machine, monkeypatch):
    machine("580.65.06", "nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.find_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.find_device() == torch.device("cpu")


RUN = ["--config", str(ROOT / "configs/tiny_sd3.yaml"), "--report_to", "none"]
MODEL = "asset:tiny_sd3"
COMMANDS = {
    "scripts/finetune.py": RUN,
    "scripts/calibrate_rewards.py": [*RUN, "--output", "calibrated.yaml"],
    "scripts/sample.py": ["--model", MODEL, "--prompts", "a fox", "--max_sequence_length", "4"],
    "eval/evaluate.py": [
        *("--pretrained_model_name_or_path", MODEL, "--prompts", "tiny"),
        *("--rewards", "brightness", "--output_dir", "out"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_before_they_load_a_model(machine, monkeypatch, tmp_path, command):
    machine("550.54.15", "nvidia0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, *COMMANDS[command]])
    with pytest.raises(SystemExit, match="error: there is an NVIDIA card that this torch can't use"):
        runpy.run_path(str(ROOT / command))["main"]()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def precision():
    """The precision of float32 comes back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("command", ["scripts/finetune.py", "scripts/calibrate_rewards.py"])
def test_tf32_is_for_products_and_convolutions_in_every_command(
    monkeypatch, tmp_path, precision, command, allow
):
    """Up to the plan, which is stopped."""
    seen = []

    def stop(*_):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        raise ValueError("far enough")

    monkeypatch.setattr("am_diffusers.run.plan.make_plan", stop)
    monkeypatch.chdir(tmp_path)
    flags = [*COMMANDS[command], "--allow_tf32", str(allow).lower()]
    monkeypatch.setattr(sys, "argv", [command, *flags])
    torch.backends.cuda.matmul.allow_tf32 = not allow
    torch.backends.cudnn.allow_tf32 = not allow
    with pytest.raises(SystemExit, match="far enough"):
        runpy.run_path(str(ROOT / command))["main"]()
    assert seen == [(allow, allow)]
