"""Text for people: secrets hidden in whatever leaves the process, Markdown, the nearest known name.

Tokens get into a run by its environment, by URLs and by paths that users paste; a config, a traceback or a
card would repeat them. Prompts, names and paths must not become markup. Tables that programs write stand
between two marks and are replaced, so that they can't drift from results.
"""

import difflib
import html
import logging
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType

HIDDEN = "***"
SHORTEST_SECRET = 8

_TOKENS = re.compile(
    # (?<![A-Za-z0-9]) and not \b: a token may follow an underscore, as in `run_hf_...`.
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?:oauth|jwt)_[\w.-]{20,}"
    r"|(?:hf|api_org)_[A-Za-z0-9]{20,}"
    r"|wandb_v\d+_\w{20,}"
    r"|(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r")"
)
_URL_USER = re.compile(r"(?<=://)[^\s/\"'<>]+@")
_NAMED = re.compile(
    r"(?i)((?:token|secret|passw(?:or)?d|(?:api|access|secret|private)[_-]?key)[\"']?\s*"
    # Prose has colons too ("unexpected token: background"): there a secret has a digit.
    r"(?:=|:(?=\s*\S*\d))\s*[\"']?)"
    r"[^\s\"',;}\]]{8,}"
)
# 40 hexadecimal digits are a commit as well (`revision:`): a wandb key only near words that say so.
_WANDB = re.compile(r"(?i)((?:wandb|login|password)[^\n]{0,80}?)(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
_SECRET_NAME = re.compile(r"token(?!iz)|secret|passw(or)?d|api_?key", re.IGNORECASE)


def redact(text: str) -> str:
    """Return `text` with every secret replaced by `***`.

    Secrets are Hugging Face, wandb and AWS keys, the user part of URLs, what follows `token=`, `password:`
    and the like, and the values (8 characters or more) of environment variables whose name says token,
    secret, password or api_key.
    """
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET
    }
    # Longest first: a secret may contain another one.
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _URL_USER.sub(f"{HIDDEN}@", _TOKENS.sub(HIDDEN, text))
    return _WANDB.sub(rf"\1{HIDDEN}", _NAMED.sub(rf"\1{HIDDEN}", text))


def redact_values(data: object) -> object:
    """Return plain data (mappings, sequences, scalars) with `redact` applied to every string value in it.

    Structure and keys stay, so that what is dumped afterwards is valid YAML or JSON.
    """
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, Mapping):
        return {key: redact_values(value) for key, value in data.items()}
    if isinstance(data, Sequence):
        return [redact_values(value) for value in data]
    return data


def guard_output() -> None:
    """Redact this process's log records and uncaught errors, our own and those of the libraries."""
    logging.setLogRecordFactory(_RedactedRecord)
    sys.excepthook = _write_redacted


class _RedactedRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 (the name is that of logging)
        return redact(super().getMessage())


def _write_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def is_unicode(text: str) -> bool:
    """Tell if a text can be written as UTF-8: it has no lone surrogate, half of an emoji for instance."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escape_markdown(text: str) -> str:
    """Return `text` on one line that Markdown and HTML show as it is."""
    plain = html.escape(" ".join(text.split()), quote=False)
    inline = re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)
    # Headings, lists, rules and quotes start a line.
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", re.sub(r"^([#+=-])", r"\\\1", inline))


def marks(name: str) -> tuple[str, str]:
    """Return the comments around a table."""
    return f"<!-- {name}: table -->", f"<!-- {name}: end -->"


def replace_table(text: str, name: str, table: str) -> str:
    """Return a Markdown text with the part between a table's marks replaced.

    Raises:
        ValueError: if the marks aren't there, once each and in order.
    """
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.0) -> str:
    """Return the one of `known` that is spelled most like `name` in any case.

    Args:
        name: name that isn't known.
        known: names to choose from.
        cutoff: least likeness, in [0, 1]; the result is empty if none has it.
    """
    by_lower_case = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else ""


def suggest(name: str, known: Collection[str]) -> str:
    """Return text for an error message: the name, the nearest of the `known` ones, and all of those."""
    return f"{name!r}: did you mean {nearest(name, known)!r}? (known: {', '.join(known)})"
