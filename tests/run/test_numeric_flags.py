"""Every numeric flag of training, evaluation and sampling at its boundary values: taken, or one line."""

import argparse
import runpy
import sys

import pytest

from am_diffusers.config.checks import readers
from am_diffusers.config.command_line import parse_config
from am_diffusers.config.values import choices, field_types
from am_diffusers.steering.options import parser as optimization_parser
from evaluating.options import parser as evaluation_parser
from finetune_runs import FINETUNE

NONSENSE = ("nan", "", "word", "0x", "1e400")
BOUNDARIES = ("0", "-1", "1", "1e30")
NUMERIC = [name for name, kind in field_types().items() if {int, float} & set(choices(kind))]
NEEDED = ("--pretrained_model_name_or_path", "m", "--train_prompts", "p", "--output_dir", "o")
REWARDS = ("--rewards", "[{name: brightness}]")


def training_error(name, text):
    method = (readers(name) or ["adjoint_matching"])[0]
    try:
        parse_config([*NEEDED, *REWARDS, "--method", method, f"--{name}={text}"])
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NUMERIC)
def test_numbers_of_a_run(name):
    for text in NONSENSE:
        message = training_error(name, text)
        assert message is not None, text
        assert f"--{name} must be" in message, text
        assert "\n" not in message, text
    for text in BOUNDARIES:
        message = training_error(name, text)
        assert message is None or (f"--{name} " in message and len(message.splitlines()) < 4), text


def sampling_parser(monkeypatch):
    """The parser of `sample.py`, which its `parse` makes."""
    made = []
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "m", "--prompts", "a"])
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self: (made.append(self), parse(self))[1]
    )
    runpy.run_path(str(FINETUNE.parent / "sample.py"))["parse"]()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    return made[0]


@pytest.mark.parametrize("program", ["evaluate", "sample", "optimize"])
def test_numbers_of_evaluation_and_sampling(monkeypatch, capsys, program):
    known, needed = {
        "evaluate": (
            evaluation_parser(),
            [*NEEDED[:2], "--prompts", "p", "--output_dir", "o", "--rewards", "r"],
        ),
        "sample": (sampling_parser(monkeypatch), ["--model", "m", "--prompts", "a"]),
        "optimize": (
            optimization_parser(),
            ["--model", "m", "--prompts", "a", "--output", "o", "--rewards", "r"],
        ),
    }[program]
    numeric = [action for action in known._actions if isinstance(action.default, int | float | list)]
    names = {action.option_strings[0] for action in numeric if action.type is not None}
    names -= {"--lora_path", "--layouts", "--held_out_rewards"}
    for name in [*sorted(names), "--resolution", "--max_sequence_length"]:
        for text in NONSENSE:
            with pytest.raises(SystemExit):
                known.parse_args([*needed, f"{name}={text}"])
            last = capsys.readouterr().err.splitlines()[-1]
            assert f"argument {name}: must be " in last, text
        assert "must be" not in capsys.readouterr().err
