"""The command: options checked before work, results, a kill in the middle, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sample_energy
import torch
from filelock import FileLock
from safetensors.torch import load_file

SCRIPT = Path(sample_energy.__file__)
SIZES = {
    "iterations": 120,
    "batch_size": 16,
    "num_steps": 4,
    "gradient_steps": 2,
    "row_batch_size": 16,
    "hidden": 8,
    "num_samples": 60,
    "checkpointing_steps": 4,
}


def arguments(folder, sampler="asbs", **changes):
    flags = {"energy": "many_well", "dimension": 2, "sampler": sampler, "output_dir": folder, **SIZES}
    return [str(each) for name, value in (flags | changes).items() for each in (f"--{name}", value)]


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as found:
        yield found


def run(patch, *flags):
    """The command in this process."""
    patch.setattr(sys, "argv", [str(SCRIPT), *flags])
    sample_energy.main()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, patch):
    folder = tmp_path_factory.mktemp("energy") / "whole"
    run(patch, *arguments(folder))
    return folder


def test_a_run_writes_its_results(whole):
    assert {each.name for each in whole.iterdir() if each.name != ".lock"} == {
        "checkpoint.pt",
        "metrics.jsonl",
        "options.json",
        "report.json",
        "report.md",
        "samples.png",
        "samples.safetensors",
    }
    samples = load_file(whole / "samples.safetensors")
    assert samples["samples"].shape == (60, 2)
    assert samples["log_weights"].shape == (60,)
    lines = lines_of(whole)
    assert [line["iteration"] for line in lines] == list(range(120))
    assert "elbo" in lines[3]
    assert "elbo" not in lines[4]
    report = json.loads((whole / "report.json").read_text())
    # The two blocks of the corrector take no energies, the 80 iterations of the control one a path.
    assert report["energy_evaluations"] == lines[-1]["energy_evaluations"] == 80 * 16
    page = (whole / "report.md").read_text()
    assert "two exact sets" in page
    assert "isn't convergence" in page
    far = report["samples"]["transport"] > 1.5 * report["floor"]["transport"]
    assert ("**Not converged**" in page) == far
    assert re.search(r"effective share [\d.]+%", page)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whole, tmp_path, patch, capsys, number):
    """In a process of its own, stopped after the ninth iteration: one after the second checkpoint."""
    folder = tmp_path / "stopped"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 9:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signal.SIGTERM
        assert "run the same command again" in output
    assert "/120" in output  # the progress bar
    assert not (folder / "samples.safetensors").exists()
    run(patch, *arguments(folder))
    assert re.search(r"resumed at iteration \d+ of 120", capsys.readouterr().out)
    ours, theirs = (load_file(each / "samples.safetensors") for each in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines_of(folder) == lines_of(whole)


def refused(patch, capsys, *flags):
    """What the command says when it refuses its options."""
    with pytest.raises(SystemExit) as found:
        run(patch, *flags)
    assert found.value.code not in (0, None)
    return capsys.readouterr().err if found.value.code == 2 else str(found.value.code)


def test_a_run_with_other_options_is_refused(whole, patch, capsys):
    line = refused(patch, capsys, *arguments(whole, seed=5))
    assert "seed was 0" in line
    assert "choose another folder" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"energy": "gmm4"}, "did you mean 'gmm40'"),
        ({"prior_std": 2.0}, "--prior_std is not read by --sampler asbs"),
        ({"num_steps": 1}, "--num_steps must be at least 2"),
        ({"clip": -1}, "must be a finite number above 0"),
        ({"dimension": 40}, "from 1 to 16 dimensions"),
        ({"num_samples": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, patch, capsys, changes, words):
    folder = tmp_path / "new"
    assert words in refused(patch, capsys, *arguments(folder, **changes))
    assert not folder.exists()


def test_a_folder_with_other_files_is_refused(tmp_path, patch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert "has files, but of no run" in refused(patch, capsys, *arguments(tmp_path))


def test_a_folder_in_use_is_refused(whole, patch, capsys):
    with FileLock(whole / ".lock"):
        assert "in use by another run" in refused(patch, capsys, *arguments(whole))


def test_a_damaged_checkpoint_is_named(whole, tmp_path, patch, capsys):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "options.json").write_text((whole / "options.json").read_text())
    (folder / "checkpoint.pt").write_bytes(b"nothing")
    assert "checkpoint.pt cannot be read" in refused(patch, capsys, *arguments(folder))
