"""Commands leave files of others alone, say so in one line, and a dry run says what the run would refuse."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pretrain.export
import pytest
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from am_diffusers.config.command_line import parse_config
from am_diffusers.evaluation.scores import save_scores
from am_diffusers.run.leftovers import MARK, find_refusal
from am_diffusers.run.plan import make_plan
from evaluating.store import Store
from finetune_runs import FINETUNE, tiny_config

SCRIPTS = FINETUNE.parent
EVAL = SCRIPTS.parent / "eval"
PIXELS = {"rewards": [{"name": "brightness"}], "eval_rewards": [{"name": "jpeg_size"}]}


def command(name: str) -> dict:
    return runpy.run_path(str(SCRIPTS / f"{name}.py"))


def test_sample_replaces_its_own_images_alone(tmp_path: Path) -> None:
    sample = command("sample")
    options = argparse.Namespace(output=tmp_path, seed=3, num_images=2)
    sample["check_output"](options, 1)
    image = Image.new("RGB", (8, 8), "red")
    sample["save"](tmp_path / "0000-seed4.png", image, "a fox")
    sample["save"](tmp_path / "grid.png", make_image_grid([image, image], 1, 2), "grid")
    sample["check_output"](options, 1)
    for foreign in ("0000-seed3.png", "grid.png"):
        image.save(tmp_path / foreign)
        with pytest.raises(ValueError, match=rf"holds {foreign}, which this would replace: choose another$"):
            sample["check_output"](options, 1)
        (tmp_path / foreign).unlink()
    image.save(tmp_path / "0001-seed3.png")  # no image of this call
    sample["check_output"](options, 1)


def test_sample_refuses_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grid.png").write_text("mine")
    argv = ["sample.py", "--model", str(tmp_path / "nowhere"), "--prompts", "a", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=r"^error: --output .* holds grid.png"):
        runpy.run_path(str(SCRIPTS / "sample.py"), run_name="__main__")
    assert (tmp_path / "grid.png").read_text() == "mine"


def test_calibrate_replaces_a_calibration_alone(tmp_path: Path) -> None:
    calibrate, output = command("calibrate_rewards"), tmp_path / "x.yaml"
    path = tiny_config(tmp_path, tmp_path, rewards=[{"name": "brightness"}], eval_rewards=None)
    config = parse_config(["--config", str(path)])
    calibrate["_write"](output, config, ["a fox"], {"brightness": torch.zeros(1, 8)})
    frontier = tmp_path / "x.frontier.json"
    assert f"frontier: {frontier}" in output.read_text()
    calibrate["_check_output"](output)
    for file in (frontier, output):
        for text in ("learning_rate: 1e-4\n", "no: [yaml", "[]"):
            file.write_text(text)
            with pytest.raises(ValueError, match=f"would replace {file}, which is no calibration"):
                calibrate["calibrate"](["--rank", "none"], output, 1, 8)
            assert file.read_text() == text
        save_scores(frontier, ["a fox"], {"brightness": torch.zeros(1, 8)})


@pytest.mark.parametrize("name", ["report.html", "summary.json", "scores.jsonl", "comparison.csv"])
def test_an_evaluation_replaces_no_report_of_others(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, {"seed": 0}, ("a fox",), 1, 8)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which no evaluation wrote there"):
        store.open([])
    assert [file.name for file in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    store.open([])
    (tmp_path / name).write_text("its own")
    store.open([])


def test_a_dry_run_says_what_the_run_would_refuse_and_leaves_it(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    path, out = tiny_config(tiny_sd3_dir, tmp_path, **PIXELS), tmp_path / "out"
    plan = make_plan(parse_config(["--config", str(path), "--dry_run"]), 1)
    refused = f"# the run itself would be refused: --output_dir {out} holds metrics.jsonl, which this"
    assert refused not in plan.describe()
    assert not out.exists()
    out.mkdir()
    (out / "metrics.jsonl").write_text(json.dumps({"mine": 1}))
    assert refused in plan.describe()
    assert [file.name for file in out.iterdir()] == ["metrics.jsonl"]
    assert find_refusal(out, out / "logs", overwrite=True) is None
    blocked = out / "metrics.jsonl" / "below"
    found = find_refusal(blocked, blocked / "logs", overwrite=True)
    assert found == f"{blocked}: cannot write there: {blocked.parent} is not a folder that can be written to"
    (out / MARK).touch()
    assert find_refusal(out, out / "logs", overwrite=False) is None


@pytest.mark.parametrize(
    ("file", "argv", "message"),
    [
        (
            SCRIPTS / "sample.py",
            ["--model", "m", "--prompts", "a", "--seed", "-1"],
            "argument --seed: must be",
        ),
        (SCRIPTS / "export_lora.py", ["--format", "zip"], "argument --format: invalid choice: 'zip'"),
        (SCRIPTS / "convert_reward.py", [], "the following arguments are required: name, file, folder"),
        (SCRIPTS / "calibrate_rewards.py", [], "the following arguments are required: --output"),
        (SCRIPTS / "plot_run.py", ["a", "b"], "unrecognized arguments: b"),
        (EVAL / "leaderboard.py", [], "the following arguments are required: folder"),
        (EVAL / "evaluate.py", ["--shard", "2/2"], "argument --shard: expected I/N"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    file: Path,
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [file.name, *argv])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(file), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert left.value.code == 2


def test_exported_assets_have_the_mode_that_the_umask_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainers' own files are private, and copies keep their mode."""
    (tmp_path / "judge.safetensors").write_bytes(b"")
    (tmp_path / "judge.safetensors").chmod(0o600)
    monkeypatch.setattr(pretrain.export, "export_pipeline", lambda loop, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(pretrain.export, "measured", lambda folder: {})
    world = SimpleNamespace(train=[], held_out=[], labels=list, captions=list)
    pretrain.export.export(world, SimpleNamespace(folder=tmp_path))  # pyright: ignore[reportArgumentType]
    (tmp_path / "own").touch()
    expected = (tmp_path / "own").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "assets").rglob("*") if file.is_file()} == {expected}
