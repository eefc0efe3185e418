"""Width and height of images, as flags and records give them: `512` for a square, or `832x480`."""

import argparse
import re
from typing import NamedTuple

RULE = "a side in pixels such as 512, or WIDTHxHEIGHT such as 832x480"


class Resolution(NamedTuple):
    """Size of an image in pixels."""

    width: int
    height: int

    @property
    def setting(self) -> int | str:
        """The size as flags give it, in one way: the side of a square, else width x height."""
        return self.width if self.width == self.height else f"{self.width}x{self.height}"

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


def read_resolution(value: int | str) -> Resolution:
    """Read the size of a flag.

    Raises:
        ValueError: if it is none, or a side is 0; says what is expected.
    """
    match = re.fullmatch("([0-9]{1,9})(?:x([0-9]{1,9}))?", str(value))
    size = Resolution(int(match[1]), int(match[2] or match[1])) if match else Resolution(0, 0)
    if min(size) < 1:
        raise ValueError(f"must be {RULE}, got {value!r}")
    return size


def resolution_flag(text: str) -> Resolution:
    """Read a flag of argparse, as `read_resolution`.

    Raises:
        argparse.ArgumentTypeError: instead of the ValueError.
    """
    try:
        return read_resolution(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def is_resolution(value: int | str) -> bool:
    """Return whether `read_resolution` reads a value."""
    try:
        read_resolution(value)
    except ValueError:
        return False
    return True
