"""Packages that only some features need."""

import importlib
from typing import Any


def optional_module(name: str, remedy: str) -> Any:
    """Import and return a module.

    Raises:
        ValueError: if it can't be imported; ends with `remedy`.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"the package {name} can't be imported ({error}): {remedy}") from error
