"""Rows of prompt lists, the same for training and evaluation: files, data set folders, hub data sets."""

import csv
import datetime
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

UNREADABLE = (OSError, ValueError, KeyError, csv.Error, DatasetsError)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")

Data: TypeAlias = datasets.Dataset | datasets.IterableDataset
# Texts and dicts of a file, or a data set whose columns are read when they are wanted.
Rows: TypeAlias = list[object] | Data


def open_rows(source: str, *, split: str | None, limit: int | None = None) -> Rows:
    """Open the rows of a file, a data set folder or a hub data set, in their order.

    Args:
        source: txt, jsonl, json, csv, tsv or parquet file; a folder that `datasets` reads; or a hub id.
        split: split of a folder or hub data set; None = the only one there is.
        limit: number of rows to read, the first ones; files may give more, None = all.

    Raises:
        OSError, ValueError, KeyError, csv.Error, DatasetsError: `UNREADABLE`, with a message for users.
    """
    path = Path(source)
    if path.is_dir():
        return _head(_from_folder(path, split), limit)
    if path.is_file():
        rows = _from_file(path)
        return rows[:limit] if isinstance(rows, list) else _head(rows, limit)
    if path.suffix in SUFFIXES or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file or folder (a hub data set is written owner/name)")
    return _from_hub(source, split, limit)


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
    """Return the rows as JSON values: no media or bytes, times as ISO text, NaN as None, labels by name.

    Raises:
        OSError: a row of a csv or tsv file has more cells than the header: a text with an unquoted comma.
    """
    if not isinstance(rows, list):
        return [_plain(dict(row)) for row in _without_media(rows)]
    long = [number for number, row in enumerate(rows) if isinstance(row, dict) and None in row]
    if long:
        raise OSError(
            f"{len(long)} rows have more cells than the header (first: row {long[0]}, counted from 0): quote "
            "texts that hold the separator"
        )
    return [_plain(row) for row in rows]


def check_texts(source: str, column: Iterable[object]) -> list[str]:
    """Return the values of a column as prompts, surrounding white space removed.

    Raises:
        ValueError: no row, or rows that hold no text.
    """
    prompts = [value.strip() if isinstance(value, str) else "" for value in column]
    if not prompts:
        raise ValueError(f"prompts {source}: no prompt in it")
    blank = [row for row, prompt in enumerate(prompts) if not prompt]
    if blank:
        raise ValueError(
            f"prompts {source}: {len(blank)} rows hold no text (first: row {blank[0]}, counted from 0): "
            "remove them"
        )
    return prompts


def no_column(column: str, known: Iterable[str]) -> str:
    """Return the message about a column that isn't there."""
    return f"no column {column!r}; it has {', '.join(map(repr, sorted(known)))}"


def download_command(hub_id: str, *, files: Sequence[str] = (), revision: str | None = None) -> str:
    """Return the shell command that puts a hub data set, or some of its files, into the local cache."""
    words = ["hf", "download", "--repo-type", "dataset", hub_id, *files]
    return shlex.join(words if revision is None else [*words, "--revision", revision])


def _from_file(path: Path) -> Rows:
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [line for line in lines if line.strip()]
    if path.suffix == ".parquet":
        return _as_data(datasets.Dataset.from_parquet(str(path)))
    if path.suffix not in SUFFIXES:
        raise OSError(f"a file ends in one of {' '.join(SUFFIXES)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".json":
            rows = json.load(file)
            if not isinstance(rows, list):
                raise OSError("a JSON file holds a list of strings or of objects")
            return rows
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def _from_folder(path: Path, split: str | None) -> Data:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            return loaded[split or _only_split(loaded)]
        return loaded
    return _load(str(path), split, streaming=False)


def _from_hub(hub_id: str, split: str | None, limit: int | None) -> Rows:
    """Load a hub data set; streamed when only its first rows are wanted, as some hold images as well."""
    try:
        data = _load(_downloaded(hub_id) or hub_id, split, streaming=limit is not None)
    except ConnectionError as error:
        raise OSError(f"{error}: where there is a network, run {download_command(hub_id)}") from error
    head = _head(data, limit)
    return head if head.column_names else [dict(row) for row in head]  # streamed csv knows its rows alone


def _downloaded(hub_id: str) -> str | None:
    """Return, offline, the folder that `hf download` made: `datasets` looks only into a cache of its own."""
    if not is_offline_mode():
        return None
    try:
        return snapshot_download(hub_id, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _load(place: str, split: str | None, *, streaming: bool) -> Data:
    split = split or _only_split(datasets.get_dataset_split_names(place))
    return _as_data(datasets.load_dataset(place, split=split, streaming=streaming))


def _only_split(splits: Iterable[object]) -> str:
    names = [str(name) for name in splits]
    if len(names) != 1:
        raise OSError(f"name one of its splits: {', '.join(names)}")
    return names[0]


def _as_data(loaded: object) -> Data:
    assert isinstance(loaded, datasets.Dataset | datasets.IterableDataset)  # a split was named
    return loaded


def _head(data: Data, limit: int | None) -> Data:
    if limit is None:
        return data
    if isinstance(data, datasets.Dataset):  # its `take` fails on a shorter one in older versions
        return data.select(range(min(limit, len(data))))
    return data.take(limit)


def _without_media(data: Data) -> Iterable[Mapping[str, object]]:
    """Rows without columns that hold images, sounds or bytes, so that none is decoded."""
    features = data.features or datasets.Features()
    data = data.remove_columns([name for name, feature in features.items() if _is_media(feature)])
    labels = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    for row in map(dict, data):
        named = {name: kind.int2str(row[name]) for name, kind in labels.items() if row[name] is not None}
        yield {**row, **named}


def _is_media(feature: object) -> bool:
    if isinstance(feature, dict):
        return any(_is_media(part) for part in feature.values())
    if isinstance(feature, datasets.Value):
        return "binary" in feature.dtype
    inner = getattr(feature, "feature", None)  # of a list
    return hasattr(feature, "decode_example") or (inner is not None and _is_media(inner))


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
