"""Paths as users write them, on the command line and in YAML: no shell has expanded those."""

import argparse
import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})")
_NAMED = re.compile(r"([\w.-]+=)(.*)", re.DOTALL)


def expand(path: str) -> str:
    """Return a path, or `NAME=PATH`, with the home folder for a leading `~`.

    Raises:
        ValueError: it is empty, or has a variable or a user's home that can't be expanded.
    """
    if not path.strip():
        raise ValueError("is empty: is a variable of the shell unset?")
    variable = _VARIABLE.search(path)
    if variable is not None:
        raise ValueError(f"is {path}, and nothing expands {variable[0]} here: write the path itself")
    named = _NAMED.fullmatch(path)
    name, place = named.groups() if named is not None else ("", path)
    expanded = os.path.expanduser(place)
    if expanded.startswith("~"):
        raise ValueError(f"is {path}, and there is no such home folder: a file of this name is ./{place}")
    return name + expanded


def place_flag(text: str) -> str:
    """Read the value of a flag of argparse that is a path, or may be one, as `expand` does."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_flag(text: str) -> Path:
    """Read the value of a flag of argparse that is a path, as `expand` does."""
    return Path(place_flag(text))
