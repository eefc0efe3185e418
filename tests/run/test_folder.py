"""What lies in the output folder already: other people's files, finished runs, and what a failure leaves."""

import hashlib
import os
import re
import runpy
import shutil
import sys

import pytest
import yaml
from safetensors import safe_open

from finetune_runs import FINETUNE, tiny_config

QUICK = {
    "rewards": [{"name": "brightness", "weight": 2.0}],
    "eval_prompts": None,
    "eval_rewards": None,
    "max_train_steps": 2,
    "certificate_images": 0,
    "num_validation_prompts": 1,
    "num_validation_images": 1,
}
LORA = "pytorch_lora_weights.safetensors"
NAMES = (
    "README.md",
    "config.yaml",
    "evaluation.json",
    "validation.jsonl",
    "metrics.jsonl",
    "samples/iteration-000001.png",
    "samples/panel.png",
    "samples/pictures.json",
    "frontier.json",
    "error.txt",
    "stopped",
    "tracker.json",
    LORA,
    "ema/" + LORA,
)


@pytest.fixture
def tune(tiny_sd3_dir, tmp_path, monkeypatch):
    """The script with a quick config and further flags; returns the line that it stops with, or None."""

    def call(*flags, **changes):
        config = tiny_config(changes.pop("model", tiny_sd3_dir), tmp_path, **(QUICK | changes))
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--config", str(config), *map(str, flags)])
        try:
            runpy.run_path(str(FINETUNE), run_name="__main__")
        except SystemExit as stopped:
            return str(stopped.code)
        return None

    return call


def put(folder, name, text="mine\n"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def visible(folder):
    """Content of every file but hidden ones and logs, by its name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    kept = {name: path for name, path in names.items() if not re.match(r"\.|logs/", name)}
    return {name: path.read_bytes() for name, path in kept.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_the_program_did_not_write_is_refused_by_name(tune, tmp_path, name):
    put(tmp_path / "out", name)
    put(tmp_path / "out", "notes.txt")
    before = visible(tmp_path / "out")
    for _ in range(2):
        message = tune()
        assert message is not None
        assert f"{tmp_path / 'out'} holds {name}" in message
        assert "--overwrite_output_dir" in message
        assert len(message.splitlines()) == 1
        assert visible(tmp_path / "out") == before


def test_a_start_over_that_fails_before_training_loses_nothing(tune, tmp_path):
    for name in (*NAMES, "samples/iteration-000100.png"):
        if name not in ("error.txt", "stopped", "tracker.json"):  # about the last attempt, not results
            put(tmp_path / "out", name)
    before = visible(tmp_path / "out")
    message = tune("--overwrite_output_dir", lora_layers=["no_such_layer"])
    assert message is not None
    assert "no linear layer ends in 'no_such_layer'" in message
    after = visible(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert "--overwrite_output_dir" in (tune() or "")


def test_a_start_over_replaces_results_and_keeps_everything_else(tune, tmp_path):
    out = tmp_path / "out"
    kept = ("notes.txt", "samples/mine.png", "data/README.md")
    for name in (*NAMES, "samples/iteration-000100.png", *kept):
        put(out, name)
    assert tune("--overwrite_output_dir") is None
    after = visible(out)
    assert {name for name, content in after.items() if content == b"mine\n"} == set(kept)
    assert "samples/iteration-000100.png" not in after
    assert "evaluation.json" not in after  # this run has no evaluation
    assert {"README.md", LORA, "config.yaml"} <= set(after)
    assert tune() is None  # its checkpoints are there: the same command, without the flag too


def test_a_lora_without_checkpoints_is_a_finished_run(tune, tmp_path):
    out = tmp_path / "out"
    assert tune() is None
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = visible(out)
    for flags in (["--seed", "1"], []):
        message = tune(*flags)
        assert message is not None
        assert f"{out} holds the LoRA of a finished run" in message
        assert "brightness" in message
        assert "2 iterations" in message
        assert "--overwrite_output_dir" in message
        assert visible(out) == before
    assert tune("--seed", "1", "--overwrite_output_dir") is None
    assert visible(out)[LORA] != before[LORA]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tune, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Nothing catches it, as nothing catches a kill."""

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("am_diffusers.training.metrics.MetricsLog.write", kill)
        with pytest.raises(Killed):
            tune()
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "config.yaml" in visible(tmp_path / "out")
    assert tune() is None


def test_card_and_evaluation_stay_until_a_longer_run_replaces_its_lora(tune, tiny_sd3_dir, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(tiny_sd3_dir, model)
    assert tune(model=model) is None
    put(out, "evaluation.json")
    before = visible(out)
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "weights")
    assert tune("--max_train_steps", 3, model=model) is not None
    assert {name: content for name, content in visible(out).items() if name in before} == before
    (tmp_path / "weights").rename(weights)
    assert tune("--max_train_steps", 3, model=model) is None
    assert "evaluation.json" not in visible(out)
    assert not (out / "error.txt").exists()


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_refused(tune, tmp_path, monkeypatch, empty):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = tune("--output_dir", empty)
    assert message is not None
    assert "--output_dir is empty" in message
    assert list((tmp_path / "here").iterdir()) == []


def test_the_umask_decides_who_may_read_results(tune, tmp_path):
    before = os.umask(0o027)
    try:
        assert tune(use_ema=True, report_to="none") is None
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"state.safetensors", LORA} <= {path.name for path in files}
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files if path.name != ".lock"} == {
        str(path): "0o640" for path in files if path.name != ".lock"
    }


def test_a_lora_names_its_run(tune, tiny_sd3_dir, tmp_path):
    assert tune(use_ema=True) is None
    for file in ((tmp_path / "out") / LORA, tmp_path / "out/ema" / LORA):
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata()
        assert found["am_diffusers.base_model"] == str(tiny_sd3_dir)
        assert re.fullmatch("[0-9a-f]{64}", found["am_diffusers.base_model_sha256"])
        assert found["am_diffusers.method"] == "adjoint_matching"
        assert yaml.safe_load(found["am_diffusers.rewards"]) == [
            {"name": "brightness", "weight": 2.0, "mean": 0.0, "std": 1.0}
        ]
        assert float(found["am_diffusers.reward_scale"]) > 0
        assert found["am_diffusers.iteration"] == "2"
        assert found["am_diffusers.version"]
        assert found["modelspec.sai_model_spec"] == "1.0.0"
        assert found["modelspec.architecture"] == "stable-diffusion-3/lora"
        assert found["modelspec.title"] == "out"
        length = int.from_bytes(file.read_bytes()[:8], "little")
        content = hashlib.sha256(file.read_bytes()[8 + length :]).hexdigest()
        assert found["modelspec.hash_sha256"] == f"0x{content}"
