"""Flags that a few methods have among their own: base classes of their `Settings`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AdvantageSettings:
    """Methods that compare the rewards of a prompt's samples.

    Attributes:
        advantages: centred subtracts the mean of a prompt's other rewards, which keeps reward_scale the
            factor of the tilt; normalised also divides by their standard deviation, as GRPO does. That is
            taken from samples_per_prompt rewards: with few it is no tilt by reward / deviation (with 2 every
            advantage is +-reward_scale, whatever the rewards): set 8 or more.
    """

    advantages: Literal["centred", "normalised"] = "centred"


@dataclass(frozen=True)
class NoSettings:
    """A method without flags of its own."""
