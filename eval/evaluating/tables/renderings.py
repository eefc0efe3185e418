"""A table as Markdown, LaTeX and HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from am_diffusers.system.text import escape_markdown

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_NUMBER = re.compile(r"-|-?\d+(\.\d+)?( \[-?\d+(\.\d+)?, -?\d+(\.\d+)?\])?")


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: plain text, to be escaped.
        best: printed bold.
        significant: marked with a star.
    """

    text: str
    best: bool = False
    significant: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under titles, names on the left and numbers on the right.

    Attributes:
        titles: titles of the columns.
        names: number of first columns that hold text; the others hold numbers.
        rows: rows, each with one cell per title.
        notes: sentences below it.

    Raises:
        ValueError: if a row has another number of cells.
    """

    titles: tuple[str, ...]
    names: int
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.titles):
                raise ValueError(f"Table: {len(self.titles)} titles but a row of {len(row)} cells")


def to_markdown(table: Table) -> str:
    """Write a table in GitHub's Markdown, the notes below."""
    rules = ["---"] * table.names + ["---:"] * (len(table.titles) - table.names)
    lines = [[escape_markdown(title) for title in table.titles], rules]
    lines += [[_markdown(cell) for cell in row] for row in table.rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{escape_markdown(note)}\n" for note in table.notes)


def to_latex(table: Table) -> str:
    """Write a table as a tabular for the package booktabs, the notes as comments above it."""
    columns = "l" * table.names + "r" * (len(table.titles) - table.names)
    lines = [[escape_latex(title) for title in table.titles]]
    lines += [[_latex(cell) for cell in row] for row in table.rows]
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    notes = [f"% {' '.join(note.split())}" for note in table.notes]
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([*notes, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end]) + "\n"


def to_page(tables: Sequence[Table], title: str) -> str:
    """Write a web page of tables that loads nothing."""
    style = "body{font-family:sans-serif} td,th{padding:.2em .8em;text-align:left;white-space:nowrap}"
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    body = f"<h1>{escape(title)}</h1>\n{''.join(map(to_html, tables))}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def to_html(table: Table) -> str:
    """Write a `<table>`, the notes as paragraphs."""
    head = "".join(f"<th>{escape(title)}</th>" for title in table.titles)
    body = "".join(f"<tr>{''.join(_html(cell) for cell in row)}</tr>\n" for row in table.rows)
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in table.notes)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n{notes}"


def escape_latex(text: str) -> str:
    """Escape `text` into one line that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _markdown(cell: Cell) -> str:
    text = cell.text if _is_number(cell.text) else escape_markdown(cell.text)
    return (f"**{text}**" if cell.best else text) + ("\\*" if cell.significant else "")


def _latex(cell: Cell) -> str:
    text = cell.text.replace("-", "$-$") if _is_number(cell.text) else escape_latex(cell.text)
    return (rf"\textbf{{{text}}}" if cell.best else text) + ("$^{*}$" if cell.significant else "")


def _html(cell: Cell) -> str:
    text = escape(cell.text)
    return f"<td>{f'<b>{text}</b>' if cell.best else text}{'*' if cell.significant else ''}</td>"


def _is_number(text: str) -> bool:
    """Return whether a text is a number, alone or with its interval, or the `-` of none: no escaping."""
    return _NUMBER.fullmatch(text) is not None
