"""Rows of prompt lists, once they are read: their columns, their values, checked texts."""

import datetime
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import datasets

from am_diffusers.system.text import is_unicode

Data: TypeAlias = datasets.Dataset | datasets.IterableDataset
# Texts and dicts of a file, or a data set whose columns are read when they are wanted.
Rows: TypeAlias = list[object] | Data


def columns_of(rows: Rows) -> list[str]:
    """Names of the columns or keys, in the order of their appearance; none where all rows are texts."""
    if not isinstance(rows, list):
        return list(rows.column_names or [])
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row if key is not None))


def values(rows: Rows, column: str) -> list[object]:
    """Return rows that are texts as they are, and the value under `column` of the others.

    Raises:
        OSError: no such column; the message lists those there are.
    """
    known = columns_of(rows)
    if (known or not isinstance(rows, list)) and column not in known:
        raise OSError(no_column(column, known))
    if isinstance(rows, list):
        return [row.get(column) if isinstance(row, dict) else row for row in rows]
    return [dict(row)[column] for row in rows.select_columns([column])]


def plain_rows(rows: Rows) -> list[object]:
    """Return the rows as JSON values: no media or bytes, times as ISO text, NaN as None, labels by name."""
    return [_plain(row) for row in (rows if isinstance(rows, list) else map(dict, _without_media(rows)))]


def check_texts(source: str, column: Iterable[object]) -> list[str]:
    """Return the values of a column as prompts, surrounding white space removed.

    Raises:
        ValueError: no row, rows that hold no text, or half of a character.
    """
    prompts = [value.strip() if isinstance(value, str) else "" for value in column]
    if not prompts:
        raise ValueError(f"prompts {source}: no prompt in it")
    check_unicode(source, prompts)
    blank = [row for row, prompt in enumerate(prompts) if not prompt]
    if blank:
        raise ValueError(
            f"prompts {source}: {len(blank)} rows hold no text (first: row {blank[0]}, counted from 0): "
            "remove them"
        )
    return prompts


def check_negative_prompt(text: str, guidance_scales: Iterable[float]) -> None:
    """Check that a negative prompt has an effect and whole characters.

    Raises:
        ValueError: if not; the message says what to do.
    """
    check_unicode("--negative_prompt", [text])
    if text and max(guidance_scales) <= 1:
        raise ValueError("--negative_prompt has no effect without guidance: set --guidance_scale above 1")


def check_unicode(source: str, texts: Iterable[str]) -> None:
    """Check that texts are of whole characters.

    Raises:
        ValueError: names the source and the row.
    """
    for row, text in enumerate(texts):
        if not is_unicode(text):
            raise ValueError(f"prompts {source}: {half_a_character(row)}")


def half_a_character(row: int) -> str:
    """Return the message about a row with a lone surrogate."""
    return (
        f"row {row}, counted from 0: half of a character (a lone surrogate such as \\ud83d: an emoji cut in "
        "two?): mend or remove it"
    )


def no_column(column: str, known: Iterable[str]) -> str:
    """Return the message about a column that isn't there."""
    return f"no column {column!r}; it has {', '.join(map(repr, sorted(known)))}"


def head(data: Rows, limit: int | None) -> Rows:
    """Return the first rows; None = all."""
    if limit is None:
        return data
    if isinstance(data, list):
        return data[:limit]
    if isinstance(data, datasets.Dataset):  # its `take` fails on a shorter one in older versions
        return data.select(range(min(limit, len(data))))
    return data.take(limit)


def _without_media(data: Data) -> Iterable[Mapping[str, object]]:
    """Rows without columns that hold images, sounds or bytes, so that none is decoded."""
    features = data.features or datasets.Features()
    data = data.remove_columns([name for name, feature in features.items() if is_media(feature)])
    labels = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    for row in map(dict, data):
        named = {name: kind.int2str(row[name]) for name, kind in labels.items() if row[name] is not None}
        yield {**row, **named}


def is_media(feature: object) -> bool:
    """Tell if a column holds images, sounds or bytes, in itself or in a part."""
    if isinstance(feature, dict):
        return any(is_media(part) for part in feature.values())
    if isinstance(feature, datasets.Value):
        return "binary" in feature.dtype
    inner = getattr(feature, "feature", None)  # of a list
    return hasattr(feature, "decode_example") or (inner is not None and is_media(inner))


def _plain(value: object) -> object:
    """Return a JSON value; what can't be one is left out of the dict or list it stands in."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items() if _has_plain(part)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value if _has_plain(part)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _has_plain(value: object) -> bool:
    simple = (str, int, float, bool, dict, list, tuple, datetime.date, datetime.time)
    return value is None or isinstance(value, simple)
