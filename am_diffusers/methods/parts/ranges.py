"""Ranges of flags: how a record of them checks its values, and says all that is wrong."""

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

Check = tuple[object, str, str]
"""Whether a value is in range, its flag, and the range in words."""


def require(settings: Any, checks: Iterable[Check]) -> None:
    """Check the ranges of a record of flags, and that flags with a choice have one of its values.

    Raises:
        ValueError: naming each flag out of range, what it must be and what it is.
    """
    wrong = [
        f"--{name} must be {rule}, got {getattr(settings, name)}"
        for good, name, rule in [*_choices(settings), *checks]
        if not good
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def _choices(settings: Any) -> list[Check]:
    """Return a check for each flag that is one of a few words: only the command line looks at types."""
    found = []
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            *others, last = get_args(hint)
            rule = f"{', '.join(others)} or {last}"
            found.append((getattr(settings, name) in (*others, last), name, rule))
    return found
