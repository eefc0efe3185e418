"""What a mistyped name probably meant."""

import difflib
from collections.abc import Collection


def suggest(name: str, known: Collection[str]) -> str:
    """For an error message: the name, the nearest of the `known` ones, and all of those."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
    return f"{name!r}: did you mean {close[0]!r}? (known: {', '.join(sorted(known))})"
