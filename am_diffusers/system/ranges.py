"""Ranges of numbers that several commands take: one meaning of a seed, a count and guidance for all."""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

LARGEST = 2**63 - 1


class Range(NamedTuple):
    """Numbers that a flag takes.

    Attributes:
        kind: int or float.
        rule: what a number must be, in words.
        holds: whether a number is in the range.
    """

    kind: type[int] | type[float]
    rule: str
    holds: Callable[[float], bool]

    def read(self, text: str) -> float:
        """Read the value of a flag of argparse.

        Raises:
            argparse.ArgumentTypeError: it isn't in the range.
        """
        try:
            number = self.kind(text)
        except ValueError:
            number = math.nan
        if not self.holds(number):
            raise argparse.ArgumentTypeError(f"must be {self.rule}, got {text!r}")
        return number


COUNT = Range(int, "a whole number of at least 1", lambda number: 1 <= number <= LARGEST)
STEPS = Range(int, "a whole number from 1 to 1000", lambda number: 1 <= number <= 1000)
SEED = Range(int, "a whole number from 0 to 2**63 - 1", lambda number: 0 <= number <= LARGEST)
NUMBER = Range(float, "a finite number", math.isfinite)
POSITIVE = Range(float, "a finite number above 0", lambda number: 0 < number < math.inf)
GUIDANCE = Range(
    float, "at least 1 (1 = no guidance, as for any less in Diffusers)", lambda number: 1 <= number < math.inf
)
