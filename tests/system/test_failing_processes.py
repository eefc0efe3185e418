"""Two real processes: what they exchange, and how they end when one of them fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from failing_processes import CASES, MESSAGE
from failing_runs import FAILING
from finetune_runs import tiny_config, write_rewards


def launch(worker: str, folder: Path, *options: str) -> list[dict]:
    """What each of two processes writes that go through all points one after the other."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    file = Path(__file__).parents[1] / worker
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(file), str(folder), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> list[dict]:
    return launch("failing_processes.py", tmp_path_factory.mktemp("failing"))


@pytest.fixture(scope="module")
def runs(tiny_sd3_dir, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("runs")
    write_rewards(folder)
    changes = {"divergence": "js", "divergence_samples": 4, "max_train_steps": 1}
    return launch("failing_runs.py", folder, str(tiny_config(tiny_sd3_dir, folder, **changes)))


@pytest.mark.parametrize(("point", "failing"), [(point.__name__, failing) for point, failing in CASES])
def test_when_one_process_fails_both_end_with_its_error_within_seconds(left, point, failing):
    name, message, seconds = left[failing][f"{point}-{failing}"]
    assert (name, message) == ("ArithmeticError", MESSAGE)
    name, message, waited = left[1 - failing][f"{point}-{failing}"]
    assert name == "PeerError"
    assert "ArithmeticError" in message
    assert max(seconds, waited) < 5


def test_objects_of_all_processes_and_of_main_reach_all(left):
    for index, each in enumerate(left):
        assert each["objects"] == [[0, 0], [1, 0], [1, 1]]
        assert each["from_main"] == {"process": 0}
        assert each["on_main"] == (0 if index == 0 else None)


def test_the_timeout_is_one_of_tensors_and_not_of_waiting_for_the_main_process(left):
    for each in left:
        assert each["timeout"] == 10
        assert each["uploaded"] == "uploaded"  # after 12 s


def test_numbers_are_summed_exactly_and_the_group_is_left(left):
    for each in left:
        assert each["sums"] == {"bytes": 2**41 + 1, "loss": 0.5}
        assert each["joined"] is False


@pytest.mark.slow
@pytest.mark.parametrize("point", FAILING)
def test_when_one_process_of_a_run_fails_both_end_with_its_error_within_seconds(runs, point):
    failing = FAILING[point]
    message, seconds = runs[failing][point]
    assert "on purpose" in message
    message, waited = runs[1 - failing][point]
    assert "another process failed with ArithmeticError" in message
    assert max(seconds, waited) < 60
