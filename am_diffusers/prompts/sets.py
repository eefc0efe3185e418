"""Lists of prompts: texts alone for training; with categories and row numbers for evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from am_diffusers.prompts.files import (
    UNREADABLE,
    check_texts,
    columns_of,
    no_column,
    open_rows,
    plain_rows,
    values,
)

# What published prompt sets call their columns; found whatever their case, the first that is there.
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
CATEGORY_COLUMNS = ("category", "categories", "challenge", "style", "tag")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; the index of a prompt is its id, the noise of its pictures follows from it.

    Attributes:
        prompts: P >= 1 texts, none blank.
        categories: by category column, the P values of it; "" where a prompt has none.
        rows: the P rows as they were read (GenEval's judge wants its metadata back); {} where there are none.

    Raises:
        ValueError: if the lengths disagree.
    """

    prompts: tuple[str, ...]
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: tuple[dict[str, object], ...] = ()

    def __post_init__(self) -> None:
        columns = {"rows": self.rows or self.prompts, **self.categories}
        for name, column in columns.items():
            if len(column) != len(self.prompts):
                raise ValueError(f"PromptSet: {len(self.prompts)} prompts but {len(column)} of {name}")

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompt_set(
    source: str,
    *,
    column: str | None = None,
    category_columns: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> PromptSet:
    """Prompts of a file, a data set folder or a hub data set, in their order, duplicates kept.

    Args:
        source: txt (one prompt a line, blank lines skipped), json or jsonl (strings or objects), csv, tsv,
            parquet; a folder that `datasets` reads; or a hub id `owner/name`.
        column: column or key that holds the prompt; None = the first of `PROMPT_COLUMNS` that is there.
        category_columns: columns to report by; None = those of `CATEGORY_COLUMNS` that are there.
        split: split of a folder or hub data set; None = the only one.
        limit: at most so many prompts, the first ones; None = all.

    Returns:
        The prompts, surrounding white space removed; their rows without pictures and bytes, as JSON values.

    Raises:
        ValueError: nothing there, not readable, no such column, or a row without a prompt.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"prompts {source}: expected at least one, got a limit of {limit}")
    try:
        opened = open_rows(source, split=split, limit=limit)
        columns = columns_of(opened)
        rows = plain_rows(opened)
        prompt_column = _prompt_column(column, columns)
        shown = _category_columns(category_columns, columns, prompt_column)
    except UNREADABLE as error:
        raise ValueError(f"prompts {source}: cannot be read: {error}") from error
    dicts = tuple(row if isinstance(row, dict) else {} for row in rows)
    texts = [row.get(prompt_column) if isinstance(row, dict) else row for row in rows]
    return PromptSet(
        prompts=tuple(check_texts(source, texts)),
        categories={name: tuple(_category(row.get(name)) for row in dicts) for name in shown},
        rows=dicts if any(dicts) else (),
    )


def _prompt_column(column: str | None, columns: Sequence[str]) -> str:
    if column is None and not columns:
        return ""  # a list of texts
    if column is not None:
        _check_there([column], columns)
        return column
    lower = _by_lower_case(columns)
    found = [lower[name] for name in PROMPT_COLUMNS if name in lower]
    if not found:
        raise OSError(
            f"no column is named {', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}; it has "
            f"{', '.join(map(repr, columns))}: say which one holds the prompt"
        )
    return found[0]


def _category_columns(wanted: Sequence[str] | None, columns: Sequence[str], prompt: str) -> list[str]:
    if wanted is not None:
        _check_there(wanted, columns)
        return list(wanted)
    lower = _by_lower_case(columns)
    return [lower[name] for name in CATEGORY_COLUMNS if name in lower and lower[name] != prompt]


def _check_there(wanted: Sequence[str], columns: Sequence[str]) -> None:
    for name in wanted:
        if name not in columns:
            raise OSError(
                no_column(name, columns) if columns else f"no column {name!r}: it is a list of texts"
            )


def _by_lower_case(columns: Sequence[str]) -> Mapping[str, str]:
    """Columns by their name in lower case; of several the first."""
    return {name.lower(): name for name in reversed(columns)}


def _category(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_category, value))
    return str(value).strip()


def load_prompts(
    source: str, *, column: str = "prompt", split: str = "train", limit: int | None = None
) -> list[str]:
    """Prompts of a file, a data set folder or a hub data set, in their order, duplicates kept.

    Args:
        source: txt (one prompt a line, blank lines skipped), jsonl or json (strings, or objects with the
            key `column`), csv, tsv, parquet; a folder that `datasets` reads; or a hub id `owner/name`.
        column: column or key that holds the prompt.
        split: split of a folder or hub data set.
        limit: at most so many prompts; None = all.

    Returns:
        At least one prompt, none of them blank, surrounding white space removed.

    Raises:
        ValueError: nothing there, not readable, no such column, or a row without a prompt.
    """
    try:
        texts = values(open_rows(source, split=split, limit=limit), column)
    except UNREADABLE as error:
        raise ValueError(f"prompts {source}: cannot be read: {error}") from error
    return check_texts(source, texts)
