"""How long torch's launcher leaves its processes after SIGTERM, and what SLURM's example makes of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLURM = (Path(__file__).parents[2] / "configs/slurm/finetune.sbatch").read_text()
VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
WORKER = """
import os, pathlib, signal, sys, time

def finish(*_):
    time.sleep(4)
    pathlib.Path(sys.argv[1], f"finished{os.environ['RANK']}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, finish)
pathlib.Path(sys.argv[1], f"started{os.environ['RANK']}").touch()
time.sleep(120)
"""


def test_the_slurm_example_leaves_the_processes_most_of_the_time_before_the_limit():
    (before,) = map(int, re.findall(r"^#SBATCH --signal=TERM@(\d+)$", SLURM, re.M))
    (seconds,) = map(int, re.findall(rf"^export {VARIABLE}=(\d+)$", SLURM, re.M))
    assert before - 30 < seconds < before
    assert "export PYTORCH_ALLOC_CONF=expandable_segments:True" in SLURM.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "finishes"), [(1, False), (60, True)])
def test_the_launcher_heeds_the_variable(tmp_path, seconds, finishes):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher = subprocess.Popen(
        [*command, "--main_process_port", "0", str(tmp_path / "worker.py"), str(tmp_path)],
        env=os.environ | {VARIABLE: str(seconds), "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 300
        while len(list(tmp_path.glob("started*"))) < 2:
            assert launcher.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(100)
    finally:
        launcher.kill()
    assert len(list(tmp_path.glob("finished*"))) == (2 if finishes else 0)
