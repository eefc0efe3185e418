"""Lists of prompts: texts alone for training; with categories and row numbers for evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from am_diffusers.prompts.files import UNREADABLE, open_rows
from am_diffusers.prompts.presets import is_preset, preset_files
from am_diffusers.prompts.rows import Rows, check_texts, columns_of, no_column, plain_rows, values
from am_diffusers.system.files import asset_path

# What published prompt sets call their columns; found whatever their case, the first that is there.
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
CATEGORY_COLUMNS = ("category", "categories", "challenge", "style", "tag")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; the index of a prompt is its id, the noise of its images follows from it.

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


def load_prompts(
    source: str,
    *,
    column: str | None = None,
    category_columns: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    texts_only: bool = False,
) -> PromptSet:
    """Load the prompts of a published set, a file, a data set folder or a hub data set, in their order.

    Args:
        source: name of a preset or of a copy of one, see `presets.preset_files`; txt (one prompt a line,
            blank lines skipped), json or jsonl (strings or objects), csv, tsv, parquet; a folder that
            `datasets` reads; or a hub id `owner/name`. `asset:` is the package's folder of assets.
        column: column or key that holds the prompt; None = the first of `PROMPT_COLUMNS` that is there.
        category_columns: columns to report by; None = those of `CATEGORY_COLUMNS` that are there.
        split: split of a folder or hub data set; None = the only one.
        limit: number of prompts to keep, the first ones; None = all.
        texts_only: whether categories and rows are left out; the other columns aren't read then.

    Returns:
        The prompts, surrounding white space removed, duplicates kept; their rows without images and bytes, as
        JSON values.

    Raises:
        ValueError: nothing there, not readable, no such column, or a row without a prompt.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"prompts {source}: expected at least one, got a limit of {limit}")
    files = preset_files(asset_path(source))
    if files is not None and split is not None:
        raise ValueError(f"prompts {source}: a preset is one split, got {split!r}: leave it out")
    places = [asset_path(source)] if files is None else list(map(str, files))
    if len(places) > 1:
        return _joined(places, column, category_columns, limit)
    try:
        rows = open_rows(places[0], split=split, limit=limit)
        if texts_only:
            texts, categories, kept = values(rows, column or _usual_column(columns_of(rows))), {}, ()
        else:
            texts, categories, kept = _with_categories(rows, column, category_columns)
    except UNREADABLE as error:
        raise ValueError(f"prompts {places[0]}: cannot be read: {error}") from error
    return PromptSet(tuple(check_texts(places[0], texts)), categories, kept)


def load_texts(
    source: str, *, column: str = "prompt", split: str = "train", limit: int | None = None
) -> list[str]:
    """Load the prompts of a run: the texts alone, from whatever `load_prompts` reads.

    Args:
        source: see `load_prompts`.
        column: column or key that holds the prompt; `prompt` is of a preset whatever its column is called.
        split: split of a folder or hub data set; a preset is one split, for which `train` and `test` stand.
        limit: number of prompts to keep, the first ones; None = all.

    Raises:
        ValueError: see `load_prompts`.
    """
    if is_preset(asset_path(source)):
        own, part = (None if column == "prompt" else column), (None if split in ("train", "test") else split)
        return list(load_prompts(source, column=own, split=part, limit=limit, texts_only=True).prompts)
    return list(load_prompts(source, column=column, split=split, limit=limit, texts_only=True).prompts)


def _joined(
    files: Sequence[str], column: str | None, category_columns: Sequence[str] | None, limit: int | None
) -> PromptSet:
    """Return one set of several lists; the category `style` is the name of the list."""
    wanted = ["style"] if category_columns is None else list(category_columns)
    if set(wanted) - {"style"}:
        raise ValueError(f"prompts: their one category is 'style', got {', '.join(wanted)}")
    lists = [(Path(file).stem, load_prompts(file, column=column, limit=limit)) for file in files]
    styles, texts = zip(*[(name, text) for name, one in lists for text in one.prompts][:limit], strict=True)
    return PromptSet(prompts=texts, categories={name: styles for name in wanted})


def _with_categories(
    opened: Rows, column: str | None, category_columns: Sequence[str] | None
) -> tuple[list[object], dict[str, tuple[str, ...]], tuple[dict[str, object], ...]]:
    """Return the values of the prompt's column, those of the categories, and the rows as JSON values."""
    columns, rows = columns_of(opened), plain_rows(opened)
    if column is not None:
        _check_there([column], columns)
    name = column or _usual_column(columns)
    shown = _category_columns(category_columns, columns, name)
    dicts = tuple(row if isinstance(row, dict) else {} for row in rows)
    texts = [row.get(name) if isinstance(row, dict) else row for row in rows]
    categories = {each: tuple(_category(row.get(each)) for row in dicts) for each in shown}
    return texts, categories, dicts if any(dicts) else ()


def _usual_column(columns: Sequence[str]) -> str:
    """Return the column that holds the prompt; empty for a list of texts."""
    if not columns:
        return ""
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
    """Return the columns by their name in lower case; of several the first."""
    return {name.lower(): name for name in reversed(columns)}


def _category(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_category, value))
    return str(value).strip()
