"""Config from YAML files and flags (the command line wins), and back to YAML.

All sections of `config.Config` share one flat name space, so that flags read as in the Diffusers scripts.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader

from am_diffusers.config import Config, section_types
from am_diffusers.config.checks import check_belonging, check_values
from am_diffusers.config.hints import explain
from am_diffusers.config.values import as_meant, check_kinds, field_types, spell_out_number
from am_diffusers.methods import METHODS
from am_diffusers.system.files import read_utf8
from am_diffusers.system.paths import expand
from am_diffusers.system.text import redact_values

REWARD_LISTS = ("rewards", "eval_rewards")
MODE = "flags"
"""Jsonargparse's name of how values are read: YAML, as the flags mean it."""

PATHS = (
    "output_dir",
    "logging_dir",
    "pretrained_model_name_or_path",
    "init_lora",
    "train_prompts",
    "eval_prompts",
    "frontier",
    "resume_from_checkpoint",
)
"""Flags that are paths or may be: their homes are expanded; of rewards, `model` is."""


def _load_yaml(text: str) -> Any:
    return as_meant(get_loader("yaml")(text))


set_loader(MODE, _load_yaml, (yaml.YAMLError,))


def parse_config(argv: Sequence[str], *, program: str = "finetune.py") -> Config:
    """Read `--config FILE.yaml --flag value ...`; with `--print_config` print the config and exit.

    Args:
        argv: command line without the program's name.
        program: name shown by `--help`.

    Raises:
        ValueError: unknown key (with the nearest known one), missing key, wrong type or value; the
            message fits one screen.
        SystemExit: after `--print_config` or `--help`.
    """
    parser = _parser(program)
    try:
        words = _replace_rewards(_spell_out(_expand_config_files(argv)))
        parsed = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    check_kinds(vars(parsed))
    sections = _make_sections(_expand_paths(vars(parsed)))
    own = {name: sections.pop(name) for name in METHODS}
    config = Config(own=own, **sections)
    check_values(config)
    check_belonging(config)
    if parsed.print_config:
        sys.stdout.write(to_yaml(config))
        sys.exit()
    return config


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that `--config` reads back to an equal Config (without `dry_run`).

    Secrets in it are redacted (`system/text.py`): it is printed, stored and shared.
    """
    flat = {k: v for section in config.sections().values() for k, v in dataclasses.asdict(section).items()}
    del flat["dry_run"]
    return yaml.safe_dump(redact_values(flat), sort_keys=False, allow_unicode=True, width=110)


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description="Fine-tune a Stable Diffusion 3 model on differentiable rewards by Adjoint Matching.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # jsonargparse's own would print values that are refused
        parser_mode=MODE,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; may be repeated.")
    parser.add_argument(
        "--print_config", action="store_true", help="Print the config as YAML for --config, and exit."
    )
    known: set[str] = set()
    for section in section_types().values():
        names = {field.name for field in dataclasses.fields(section)}
        if names - known:  # methods may share a class of flags, or have none
            parser.add_class_arguments(section, None, skip=set(known))
        known |= names
    return parser


def _make_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make every section from the values of its flags; raise the errors of all together."""
    sections, errors = {}, list[str]()
    for name, section in section_types().items():
        try:
            sections[name] = section(**{f.name: values[f.name] for f in dataclasses.fields(section)})
        except ValueError as error:
            errors += str(error).splitlines()
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    return sections


def _expand_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all flags with expanded paths; raise the errors of all together."""
    expanded, errors = dict(values), list[str]()

    def of(name: str, path: str | None) -> str | None:
        try:
            return None if path is None else expand(path)
        except ValueError as error:
            errors.append(f"--{name} {error}")
            return path

    for name in PATHS:
        expanded[name] = of(name, values[name])
    for name in REWARD_LISTS:
        if values[name] is not None:
            expanded[name] = [dataclasses.replace(each, model=of(name, each.model)) for each in values[name]]
    if errors:
        raise ValueError("\n".join(errors))
    return expanded


def _expand_config_files(argv: Sequence[str]) -> list[str]:
    """Expand the paths of the config files."""
    words: list[str] = []
    for before, token in zip(["", *argv], argv, strict=False):
        flag = "--config=" if token.startswith("--config=") else ""
        is_path = bool(flag) or before == "--config"
        try:
            words.append(flag + expand(token.removeprefix(flag)) if is_path else token)
        except ValueError as error:
            raise ValueError(f"--config {error}") from error
    return words


def _spell_out(argv: Sequence[str]) -> list[str]:
    """Spell out bare boolean flags, as in the Diffusers scripts, and whole numbers with an exponent.

    `--dry_run` means `--dry_run=true`, `--max_train_steps 1e3` is 1000.
    """
    following, words, kinds = [*argv, "--"][1:], list[str](), field_types()
    flag = ""
    for token, after in zip(argv, following, strict=True):
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            before = flag + equals
        else:
            before, value = "", token
        kind = kinds.get(flag.removeprefix("--"))
        if kind is bool and token == flag and after.startswith("--"):
            words.append(f"{token}=true")
        else:
            words.append(f"{before}{spell_out_number(kind, value)}")
    return words


def _replace_rewards(argv: Sequence[str]) -> list[str]:
    """Empty a list of rewards before each flag or file that sets it.

    Jsonargparse merges an item into the one it replaces where both lists are as long, so that a reward named
    on the command line would keep the weights of the config file's.
    """
    words: list[str] = []
    for token, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, _, value = token.partition("=")
        for name in _lists_set_by(flag, value or following):
            words += [f"--{name}", "[]"]
        words.append(token)
    return words


def _lists_set_by(flag: str, value: str) -> list[str]:
    """Return the lists of rewards that a flag sets, by itself or by the config file it names."""
    if flag != "--config":
        return [name for name in REWARD_LISTS if flag == f"--{name}"]
    try:
        keys = yaml.safe_load(read_utf8(Path(value)))
    except OSError:
        return []  # the parser says what is wrong with it
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(
            f"--config {value}, line {line}: {error.problem}: quote text that means something else in YAML"
        ) from error
    except ValueError as error:
        raise ValueError(f"--config {value}: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"--config {value}: expected lines `flag: value`")
    return [name for name in REWARD_LISTS if name in keys]
