"""Tables that scripts write into Markdown pages, between two marks, so that they can't drift from results."""

import json
from pathlib import Path
from typing import Any


def marks(name: str) -> tuple[str, str]:
    """The comments around a table."""
    return f"<!-- {name}: table -->", f"<!-- {name}: end -->"


def replace_table(text: str, name: str, table: str) -> str:
    """A Markdown text with the part between a table's marks replaced.

    Raises:
        ValueError: if the marks aren't there, once each and in order.
    """
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def write_results(document: dict[str, Any], file: Path, table: str) -> None:
    """Write results as JSON, and their table into rewards.md beside it, under the file's name."""
    page = file.with_name("rewards.md")
    text = replace_table(page.read_text("utf-8"), file.stem, table)
    file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    page.write_text(text, "utf-8")
