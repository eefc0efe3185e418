"""Flags of finetune.py, evaluate.py and optimize.py; `make cli-surface` writes cli_surface.txt."""

import argparse
import dataclasses
import typing
from pathlib import Path

from am_diffusers.config import RewardConfig, section_types
from am_diffusers.steering.options import parser as optimization_parser
from evaluating.options import parser as evaluation_parser

FILE = Path(__file__).with_name("cli_surface.txt")


def cli_surface() -> list[str]:
    """One line a flag; the keys of a reward are indented below `--rewards`."""
    lines: list[str] = []
    known: set[str] = set()
    for section in section_types().values():
        for field in dataclasses.fields(section):
            if field.name in known:
                continue
            known.add(field.name)
            lines.append(_line(f"--{field.name}", field, section))
            if field.name == "rewards":
                lines += [
                    _line(f"    {key.name}", key, RewardConfig) for key in dataclasses.fields(RewardConfig)
                ]
    lines += ["eval/evaluate.py", *_flags_of(evaluation_parser())]
    return [*lines, "scripts/optimize.py", *_flags_of(optimization_parser())]


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Of argparse: name, how many values, default."""
    flags = [action for action in parser._actions if action.dest != "help"]
    return [
        f"    {flag.option_strings[0]} {flag.nargs or 1}"
        + (", required" if flag.required else f" = {flag.default!r}")
        for flag in flags
    ]


def _line(name: str, field: dataclasses.Field[object], owner: type) -> str:
    text = _type(typing.get_type_hints(owner)[field.name])
    if field.default_factory is not dataclasses.MISSING:
        return f"{name}: {text} = {field.default_factory()!r}"
    return f"{name}: {text}" + ("" if field.default is dataclasses.MISSING else f" = {field.default!r}")


def _type(kind: object) -> str:
    """A type as it is written, in the same way on every version of Python."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"list[{_type(arguments[0])}]"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, arguments))
    if arguments:
        return " or ".join(map(_type, arguments))
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


if __name__ == "__main__":
    FILE.write_text("\n".join(cli_surface()) + "\n")
