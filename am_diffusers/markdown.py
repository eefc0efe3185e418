"""Any text inside of Markdown: prompts, names and paths must not become markup."""

import html
import re


def escape_markdown(text: str) -> str:
    """`text` on one line that Markdown and HTML show as it is."""
    plain = html.escape(" ".join(text.split()), quote=False)
    inline = re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)
    # Headings, lists, rules and quotes start a line.
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", re.sub(r"^([#+=-])", r"\\\1", inline))
