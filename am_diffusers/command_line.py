"""Config from YAML files and flags (the command line wins), and back to YAML.

All sections of `config.Config` share one flat name space, so that flags read as in the Diffusers scripts.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from am_diffusers.config import Config, RewardConfig
from am_diffusers.config.checks import check_values
from am_diffusers.redact import redact_values

SECTIONS = typing.get_type_hints(Config)
FIELDS = {
    name: annotation
    for section in SECTIONS.values()
    for name, annotation in typing.get_type_hints(section).items()
}


def parse_config(argv: Sequence[str], *, program: str = "finetune.py") -> Config:
    """Config of `--config FILE.yaml --flag value ...`.

    Args:
        argv: command line without the program's name.
        program: name shown by `--help`.

    Raises:
        ValueError: unknown key (with the nearest known one), missing key, wrong type or value; the
            message fits one screen.
    """
    parser = _parser(program)
    try:
        parsed = parser.instantiate(parser.parse_args(_spell_out_switches(argv)))
    except ArgumentError as error:
        raise ValueError(_explain(str(error))) from error
    sections = {
        name: section(**{f.name: parsed[f.name] for f in dataclasses.fields(section)})
        for name, section in SECTIONS.items()
    }
    config = Config(**sections)
    check_values(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back to an equal Config (`dry_run` left out).

    Secrets in it are redacted (`redact.py`): it is printed, stored and shared.
    """
    flat = {key: value for section in dataclasses.asdict(config).values() for key, value in section.items()}
    del flat["dry_run"]
    return yaml.safe_dump(redact_values(flat), sort_keys=False, allow_unicode=True, width=110)


def asset_path(path: str) -> str:
    """`path` with a leading `asset:` replaced by the package's asset folder.

    Raises:
        ValueError: if the package ships no such asset.
    """
    if not path.startswith("asset:"):
        return path
    folder = Path(__file__).parent / "assets"
    resolved = folder / path.removeprefix("asset:")
    if not resolved.exists():
        shipped = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.exists() else "none"
        raise ValueError(f"{path}: no such asset in {folder} (shipped: {shipped})")
    return str(resolved)


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description="Fine-tune a Stable Diffusion 3 model on differentiable rewards by Adjoint Matching.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; may be repeated.")
    for section in SECTIONS.values():
        parser.add_class_arguments(section, None)
    return parser


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """`--dry_run` means `--dry_run=true`: a bare boolean flag, as in the Diffusers scripts."""
    following = [*argv, "--"][1:]
    switches = {f"--{name}" for name, annotation in FIELDS.items() if annotation is bool}
    return [
        f"{token}=true" if token in switches and after.startswith("--") else token
        for token, after in zip(argv, following, strict=True)
    ]


def _explain(message: str) -> str:
    """Jsonargparse's message, with the nearest known key where one is unknown."""
    unknown = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)", message)
    if unknown is None:
        return message
    name = unknown[1] or unknown[2]
    known = [*FIELDS, "config", *(f.name for f in dataclasses.fields(RewardConfig))]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown key '{name}': did you mean '{nearest}'? (all keys: --help)"
