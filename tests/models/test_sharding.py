"""Frozen weights spread over two processes (FSDP2 on gloo)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_runs import FINETUNE, read_metrics, start, tiny_config, write_rewards


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_a_sharded_model_is_the_whole_one_bit_by_bit(tiny_sd3_dir, tmp_path):
    script, port = Path(__file__).parents[1] / "sharded_model.py", str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    arguments = [*command, str(script), str(tiny_sd3_dir), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


@pytest.mark.slow
def test_a_sharded_run_is_the_run_of_one_process(tiny_sd3_dir, tmp_path):
    """Training, validation, checkpoint and evaluation of three prompts on two processes that work in step."""
    write_rewards(tmp_path)
    config = str(tiny_config(tiny_sd3_dir, tmp_path, learning_rate=3e-4, max_train_steps=3, use_ema=True))
    process = start(["--config", config], tmp_path / "one.log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "one.log").read_text()[-2000:]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = [
        "--main_process_port",
        "0",
        str(FINETUNE),
        "--config",
        config,
        "--output_dir",
        tmp_path / "two",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [*launch, *map(str, options), "--shard_weights", "--max_train_steps"]
    for steps in ("2", "3"):  # the second goes on from the first's checkpoint
        done = subprocess.run([*command, steps], capture_output=True, text=True, env=environment, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "after 2 iterations" in done.stdout
    one, two = read_metrics(tmp_path / "out"), read_metrics(tmp_path / "two")
    for name in ("loss", "reward", "path_kl"):
        expected = pytest.approx([line[name] for line in one], rel=1e-5, abs=1e-6)
        assert [line[name] for line in two] == expected, name
    evaluations = [json.loads((tmp_path / out / "evaluation.json").read_text()) for out in ("out", "two")]
    of_one, of_two = (each["rewards"]["hpsv2"]["tuned_mean"] for each in evaluations)
    assert of_two == pytest.approx(of_one, rel=1e-4)
