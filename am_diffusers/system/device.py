"""The device of a program: a card that CUDA can't use is refused, never silently replaced by the CPU."""

import os
import re
import subprocess
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

DEVICES = Path("/dev")
"""Where the kernel's module shows the cards."""

DRIVERS = {11: 450, 12: 525, 13: 580}
"""The first driver for each major version of CUDA (NVIDIA, "CUDA Compatibility", table 1)."""

WHEELS = "https://download.pytorch.org/whl"


def check_card() -> None:
    """Refuse an NVIDIA card that this torch, built for CUDA, can't use, unless the CPU was asked for.

    Raises:
        ValueError: names the drivers (there, needed) and the index of torch for older ones.
    """
    cuda = torch.version.cuda
    if cuda is None or asked_for_cpu() or torch.cuda.is_available():
        return
    driver = driver_version()
    if driver is None and not any(DEVICES.glob("nvidia[0-9]*")):
        return
    needed = DRIVERS.get(int(cuda.split(".")[0]))
    raise ValueError(
        f"there is an NVIDIA card that this torch can't use: it is built for CUDA {cuda}, which needs driver "
        f"{needed or 'of its time'} or newer, and here is {driver or 'none that answers'} ({_reason()}). "
        f"{_remedy(driver, needed)}; or set ACCELERATE_USE_CPU=true to run on the CPU"
    )


def asked_for_cpu() -> bool:
    """Tell if the environment asks for the CPU, or hides all cards."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    other = os.environ.get("ACCELERATE_TORCH_DEVICE", "").startswith("cpu")
    return hidden or other or parse_flag_from_env("ACCELERATE_USE_CPU")


def find_device() -> torch.device:
    """Return the device of a program that works alone: the card if there is one and no CPU was asked for.

    Raises:
        ValueError: as `check_card`.
    """
    check_card()
    return torch.device("cpu" if asked_for_cpu() or not torch.cuda.is_available() else "cuda")


def use_tf32(allow: bool) -> None:
    """Let CUDA round float32 factors to TF32, in matrix products and convolutions alike, or in neither."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow  # on by torch's default, unlike the other


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver as nvidia-smi tells it; None without one that answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^\d+(\.\d+)+$", answer, re.M)
    return found and found.group()


def _reason() -> str:
    """Return why CUDA doesn't start, in torch's words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "it says that there is no card"


def _remedy(driver: str | None, needed: int | None) -> str:
    if driver is not None and needed is not None and int(driver.split(".")[0]) >= needed:
        return (
            "The driver is new enough: restart the machine if it was updated just now, and look at "
            "nvidia-smi and at the permissions of /dev/nvidia*"
        )
    return (
        "Update the driver, or install torch for older ones: pip install --force-reinstall torch torchvision "
        f"--index-url {WHEELS}/cu126 (or cu128)"
    )
