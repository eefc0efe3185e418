"""Values as YAML and the command line give them: what is meant, and whether they are what a flag takes."""

import math
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from am_diffusers.config import RewardConfig, section_types
from am_diffusers.system.ranges import LARGEST

KINDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    list[str]: "a list of texts",
    list[RewardConfig]: "a list of rewards with names, such as [{name: pickscore}]",
}


def field_types() -> dict[str, Any]:
    """Return the type of every flag by name, in the order of the flags."""
    return {
        name: kind for section in section_types().values() for name, kind in get_type_hints(section).items()
    }


def all_kinds() -> dict[str, Any]:
    """Return the type of every flag and of every key of a reward, by name."""
    return get_type_hints(RewardConfig) | field_types()


def kind_in_words(kind: Any) -> str:
    """Return the values of a type, for instance `a whole number, auto or null`."""
    *others, last = (KINDS.get(choice, str(choice)) for choice in choices(kind))
    return f"{', '.join(others)} or {last}" if others else last


def as_meant(loaded: Any) -> Any:
    """Return loaded YAML with the word `no` where a flag takes it, and whole numbers for 1e3.

    YAML reads these as False and 1000.0.
    """
    if isinstance(loaded, list):
        return [as_meant(item) for item in loaded]
    if not isinstance(loaded, dict):
        return loaded
    kinds = all_kinds()
    return {name: _value_as_meant(kinds.get(name), value) for name, value in loaded.items()}


def spell_out_number(kind: Any, text: str) -> str:
    """Return the value of a flag on the command line, with a whole number like 1e3 as 1000."""
    try:
        number = float(text)
    except ValueError:
        return text
    whole = _value_as_meant(kind, number)
    return str(whole) if isinstance(whole, int) and not text.isdecimal() else text


def check_kinds(values: Mapping[str, Any]) -> None:
    """Check what types can't tell: no null where there is no such choice, numbers finite, of 64 bits.

    Raises:
        ValueError: naming every flag with such a value.
    """
    wrong = []
    for name, kind in field_types().items():
        value = values[name]
        items = value if isinstance(value, list) else []
        rewards = [item for item in items if isinstance(item, RewardConfig)]
        checked = [(name, kind, value)]
        for reward in rewards:
            hints = get_type_hints(RewardConfig)
            checked += [(f"{name} {key}", hints[key], given) for key, given in vars(reward).items()]
        wrong += [
            f"--{flag} must be {rule}, got {'null' if given is None else given}"
            for flag, hint, given in checked
            if (rule := _broken_rule(hint, given)) is not None
        ]
    if wrong:
        raise ValueError("\n".join(wrong))


def _broken_rule(kind: Any, value: object) -> str | None:
    if value is None and NoneType not in choices(kind):
        return kind_in_words(kind)
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "at most 2**63 - 1 in size"
    return None


def _value_as_meant(kind: Any, value: Any) -> Any:
    possible = list(choices(kind))
    if value is False and "no" in possible:
        return "no"
    if isinstance(value, float) and value.is_integer() and int in possible and float not in possible:
        return int(value)
    return as_meant(value)


def choices(kind: Any) -> Iterator[Any]:
    """Give the types and words that a type is a choice of."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) is None or get_origin(kind) is list:
        yield kind
    else:
        for choice in get_args(kind):
            yield from choices(choice)
