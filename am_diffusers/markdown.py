"""Markdown: any text inside of it, and tables that programs write.

Prompts, names and paths must not become markup. Tables stand between two marks and are replaced, so that they
can't drift from results.
"""

import html
import re


def escape_markdown(text: str) -> str:
    """`text` on one line that Markdown and HTML show as it is."""
    plain = html.escape(" ".join(text.split()), quote=False)
    inline = re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)
    # Headings, lists, rules and quotes start a line.
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", re.sub(r"^([#+=-])", r"\\\1", inline))


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
