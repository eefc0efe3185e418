r"""Rows of text files: txt, jsonl, json, csv and tsv. What could be misread is refused with its row.

Lines end by \n or \r\n and by nothing else. A csv file is quoted as RFC 4180 says; a tsv file, as prompt sets
are published, has no quoting: quotation marks belong to the text.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from am_diffusers.prompts.rows import half_a_character
from am_diffusers.system.files import read_utf8
from am_diffusers.system.text import is_unicode

LONE_RETURN = r"a carriage return alone is no line end: end lines by \n or \r\n"


def read_rows(path: Path) -> list[object]:
    """Read the rows of a text file: texts, or dicts by column.

    Raises:
        OSError, ValueError: it can't be read; names the row, counted from 0, and the line, counted from 1.
    """
    rows = _READERS[path.suffix](read_utf8(path))
    for number, row in enumerate(rows):
        if not is_unicode(json.dumps(row, ensure_ascii=False)):
            raise ValueError(half_a_character(number))
    return rows


def _lines(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if len(lines) == 1 and "\r" in lines[0]:
        raise ValueError(LONE_RETURN)
    return lines


def _texts(text: str) -> list[object]:
    return [line for line in _lines(text) if line.strip()]


def _json(text: str) -> list[object]:
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(rows, list):
        raise ValueError("a JSON file holds a list of strings or of objects")
    return rows


def _json_lines(text: str) -> list[object]:
    rows: list[object] = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            reason = f"{error.msg} in column {error.colno}: is the file whole?"
            raise ValueError(_at(len(rows), number, reason)) from error
        except RecursionError as error:
            raise ValueError(_at(len(rows), number, "nested too deeply")) from error
    return rows


def _comma_separated(text: str) -> list[object]:
    # Lines are given to the reader whole, so that it splits them at nothing else.
    return _table(_csv_rows(io.StringIO(text, newline="\n")), "quote texts that hold the separator")


def _csv_rows(text: io.StringIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line and the cells of each row; its errors have the row."""
    reader, row = csv.reader(text, strict=True), -1  # the header's
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = LONE_RETURN if "new-line character" in str(error) else str(error)
            raise ValueError(_at(row, reader.line_num, reason)) from error
        if cells is None:
            return
        if cells:
            yield reader.line_num, cells
            row += 1


def _tab_separated(text: str) -> list[object]:
    rows = [(number, line.split("\t")) for number, line in enumerate(_lines(text), 1) if line]
    for row, (number, cells) in enumerate(rows, -1):
        if any(len(cell) > 1 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1] for cell in cells):
            reason = "a cell is quoted as in CSV: tsv has no quoting: save the list as .csv"
            raise ValueError(_at(row, number, reason))
    return _table(rows, "a text holds no tab")


def _table(rows: Iterable[tuple[int, Sequence[str]]], remedy: str) -> list[object]:
    """Return rows by the names of the first, the header; each comes with the number of its line."""
    named, header = list[object](), list[str]()
    for number, cells in rows:
        if not header:
            header = list(cells)
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two columns are named {twice!r}: name each once")
        elif len(cells) != len(header):
            reason = f"{len(cells)} cells, the header has {len(header)}: {remedy}"
            raise ValueError(_at(len(named), number, reason))
        else:
            named.append(dict(zip(header, cells, strict=True)))
    return named


def _at(row: int, line: int, reason: str) -> str:
    place = "the header" if row < 0 else f"row {row}, counted from 0"
    return f"{place} (line {line}): {reason}"


_READERS: Mapping[str, Callable[[str], list[object]]] = {
    ".txt": _texts,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
}
TEXT_SUFFIXES = tuple(_READERS)
