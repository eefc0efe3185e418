"""Frozen weights spread over two processes (FSDP2 on gloo)."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_a_sharded_model_is_the_whole_one_bit_by_bit(tiny_sd3_dir, tmp_path):
    script, port = Path(__file__).parent / "sharded_model.py", str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    arguments = [*command, str(script), str(tiny_sd3_dir), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
