"""Paths that no shell has expanded, in every path of every command."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from am_diffusers.config.command_line import parse_config
from am_diffusers.system.paths import expand
from evaluating.options import parse
from evaluating.plan import lora_file
from finetune_runs import FINETUNE

SCRIPTS, EVAL = FINETUNE.parent, FINETUNE.parents[1] / "eval"
REQUIRED = {
    "pretrained_model_name_or_path": "asset:tiny_sd3",
    "output_dir": "out",
    "train_prompts": "asset:prompts/tiny.txt",
    "rewards": [{"name": "brightness"}],
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def config_of(folder, *flags, **changes):
    (folder / "run.yaml").write_text(yaml.safe_dump(REQUIRED | changes))
    return parse_config(["--config", str(folder / "run.yaml"), *flags])


PLACES = {
    "output_dir": lambda c: c.run.output_dir,
    "pretrained_model_name_or_path": lambda c: c.model.pretrained_model_name_or_path,
    "init_lora": lambda c: c.model.init_lora,
    "train_prompts": lambda c: c.prompts.train_prompts,
    "eval_prompts": lambda c: c.evaluation.eval_prompts,
    "frontier": lambda c: c.evaluation.frontier,
    "resume_from_checkpoint": lambda c: c.checkpoint.resume_from_checkpoint,
}


@pytest.mark.parametrize("name", PLACES)
def test_a_tilde_in_yaml_and_in_a_quoted_flag_is_the_home(home, name):
    found = [config_of(home, **{name: "~/x"}), config_of(home, f"--{name}", "~/x")]
    found.append(config_of(home, f"--{name}=~/x"))
    assert [PLACES[name](config) for config in found] == [str(home / "x")] * 3


def test_a_tilde_in_rewards_presets_and_the_config_file_itself_is_the_home(home):
    rewards = [{"name": "pickscore", "model": "~/p"}]
    config = config_of(home, rewards=rewards, eval_rewards=rewards, eval_prompts="DrawBench=~/d.csv")
    assert config.method.rewards[0].model == config.evaluation.eval_rewards[0].model == str(home / "p")
    assert config.evaluation.eval_prompts == f"DrawBench={home}/d.csv"
    (home / "other.yaml").write_text(yaml.safe_dump({"rewards": [{"name": "hpsv2"}]}))
    for flags in (["--config", "~/other.yaml"], ["--config=~/other.yaml"]):
        (reward,) = config_of(home, *flags, rewards=[{"name": "pickscore", "weight": 7.0}]).method.rewards
        assert (reward.name, reward.weight) == ("hpsv2", 1.0)  # nothing of the first list is left in it


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$SCRATCH/x", "nothing expands $SCRATCH here"),
        ("a/${RUN}", "nothing expands ${RUN} here"),
        ("", "is empty"),
        ("~no_such_user/x", "no such home folder"),
    ],
)
def test_what_can_not_be_expanded_is_refused_by_flag(home, name, text, message):
    with pytest.raises(ValueError, match="--") as refused:
        config_of(home, **{name: text})
    assert f"--{name} is" in str(refused.value)
    assert message in str(refused.value)


EVALUATE = [
    "--pretrained_model_name_or_path",
    "m",
    "--prompts",
    "p",
    "--rewards",
    "brightness",
    "--output_dir",
    "o",
]


def test_a_tilde_is_the_home_in_evaluations(home):
    (home / "lora.safetensors").touch()
    flags = ["--pretrained_model_name_or_path=~/m", "--lora_path", "~/a", "mine=~/lora.safetensors"]
    flags += ["--prompts=DrawBench=~/p", "--train_prompts=~/t", "--rewards", "pickscore=~/r"]
    options = parse([*flags, "--features=dinov2=~/f", "--reference_pictures=~/i", "--output_dir=~/o"])
    assert options.pretrained_model_name_or_path == f"{home}/m"
    assert options.lora_path == [f"{home}/a", f"mine={home}/lora.safetensors"]
    assert lora_file(options.lora_path[1]) == ("mine", home / "lora.safetensors")
    assert (options.prompts, options.train_prompts) == (f"DrawBench={home}/p", f"{home}/t")
    assert (options.rewards, options.features) == ([f"pickscore={home}/r"], [f"dinov2={home}/f"])
    assert (options.reference_pictures, options.output_dir) == (home / "i", home / "o")


COMMANDS = {
    "sample.py": [["--model", "X", "--prompts", "a"], ["--model", "m", "--prompt_file", "X"]],
    "export_lora.py": [
        ["--model", "m", "--lora_path", "X", "--format", "diffusers", "--output", "o.safetensors"],
        ["--model", "m", "--lora_path", "l", "--format", "diffusers", "--output", "X"],
    ],
    "calibrate_rewards.py": [["--output", "X"]],
    "convert_reward.py": [["pickscore", "X", "f"], ["pickscore", "f", "X"]],
    "plot_run.py": [["X"]],
    "evaluate.py": [[*EVALUATE, flag, "X"] for flag in ("--lora_path", "--output_dir", "--train_prompts")],
    "leaderboard.py": [["X"], ["f", "--csv", "X"], ["f", "--html", "X"], ["f", "--tex", "X"]],
    "bench_methods.py": [["--output_dir", "X"]],
    "bench_oracles.py": [["--data", "X"], ["--docs", "X"]],
}


@pytest.mark.parametrize(
    ("command", "words"), [(name, words) for name, calls in COMMANDS.items() for words in calls]
)
@pytest.mark.parametrize("bad", ["$DATA/x", ""])
def test_every_path_of_every_command_is_refused_that_is_not_expanded(
    home, command, words, bad, monkeypatch, capsys
):
    file = next(folder / command for folder in (SCRIPTS, EVAL) if (folder / command).exists())
    monkeypatch.setattr(sys, "argv", [command, *(bad if word == "X" else word for word in words)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    said = f"{stopped.value.code}{capsys.readouterr().err}"
    assert ("nothing expands $DATA here" if bad else "is empty") in said
    assert list(Path.cwd().iterdir()) == []


def test_expand_leaves_other_places_as_they_are():
    for place in ("a/b", "asset:tiny_sd3", "owner/model", "package:x", "./~/x", "x$5", "a=b", os.sep):
        assert expand(place) == place
