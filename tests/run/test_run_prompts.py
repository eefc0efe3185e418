"""The prompt lists of a run: published sets by name, and prompts that are in both lists."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from am_diffusers.config.command_line import parse_config
from am_diffusers.prompts.sets import load_texts
from am_diffusers.run.build import warn
from am_diffusers.run.plan import make_plan
from finetune_runs import tiny_config

SAMPLE = Path(__file__).parents[2] / "scripts/sample.py"
PIXELS = {"rewards": [{"name": "brightness"}], "eval_rewards": [{"name": "jpeg_size"}]}


def test_evaluation_prompts_that_are_trained_on_are_cautioned_against(tiny_sd3_dir, tmp_path, caplog):
    path = tiny_config(tiny_sd3_dir, tmp_path, **PIXELS)
    assert "caution" not in make_plan(parse_config(["--config", str(path)]), 1).describe()
    (tmp_path / "leaky.txt").write_text("a red apple\nfrog, small and green\nthe grey sea\n")
    leaky = ["--config", str(path), "--eval_prompts", str(tmp_path / "leaky.txt")]
    plan = make_plan(parse_config(leaky), 1)
    text = plan.describe()
    assert "# caution: leak check: 3 evaluation prompts, 3 training prompts: 2 evaluation prompts" in text
    assert "#   exact: prompt 0 'a red apple': trained on 'a red apple'\n" in text
    assert all(line.startswith("#") for line in text[text.index("# caution") :].splitlines())
    with caplog.at_level(logging.WARNING):
        warn(plan)
    assert "2 evaluation prompts were trained on (1 exact, 1 reworded)" in caplog.text


def test_prompts_that_the_run_does_not_reach_are_no_leak(tiny_sd3_dir, tmp_path):
    train = [f"a {word} fox" for word in ("red", "blue", "green", "grey", "black", "white")]
    path = tiny_config(tiny_sd3_dir, tmp_path, max_train_steps=1, train_batch_size=1, **PIXELS)
    (tmp_path / "train.txt").write_text("\n".join(train))
    (tmp_path / "eval.txt").write_text("\n".join(train))
    plan = make_plan(parse_config(["--config", str(path)]), 1)
    assert f"{len(train)} evaluation prompts, 1 training prompts: 1 evaluation prompts" in plan.leaks


def test_published_sets_are_trained_and_evaluated_on_by_name(tiny_sd3_dir, tmp_path):
    path = tiny_config(tiny_sd3_dir, tmp_path, train_prompts="tiny-train", eval_prompts="tiny", **PIXELS)
    plan = make_plan(parse_config(["--config", str(path)]), 1)
    assert plan.eval_prompts == load_texts("asset:prompts/eval.txt")
    assert plan.train_prompts == load_texts("asset:prompts/train.txt")
    assert plan.leaks == ""
    wrong = ["--config", str(path), "--train_prompts_split", "validation"]
    with pytest.raises(ValueError, match="a preset is one split, got 'validation'"):
        make_plan(parse_config(wrong), 1)


def test_half_of_a_character_on_the_command_line_is_named_before_a_model_is_loaded(tmp_path):
    call = [sys.executable, str(SAMPLE), "--model", str(tmp_path / "nowhere"), "--prompts", "a fox"]
    done = subprocess.run([*call, b"half \xed\xa0\xbd"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: prompts --prompts: row 1, counted from 0: half of a character")
    assert len(done.stderr.splitlines()) == 1
