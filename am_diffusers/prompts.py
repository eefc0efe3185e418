"""Prompt lists from files and data sets, and which prompts an iteration takes.

The order is a function of (seed, epoch) alone, so nothing has to be saved to resume it and the number of
processes does not change it.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import torch
from datasets.exceptions import DatasetsError

UNREADABLE = (OSError, ValueError, KeyError, csv.Error, DatasetsError)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


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
        values = _read(source, column, split, limit)
    except UNREADABLE as error:
        raise ValueError(f"prompts {source}: cannot be read: {error}") from error
    prompts = [value.strip() if isinstance(value, str) else "" for value in values][:limit]
    if not prompts:
        raise ValueError(f"prompts {source}: no prompt in it")
    blank = [row for row, prompt in enumerate(prompts) if not prompt]
    if blank:
        raise ValueError(
            f"prompts {source}: {len(blank)} rows hold no text (first: row {blank[0]}, counted from 0): "
            "remove them"
        )
    return prompts


def prompt_rows(
    seed: int, iteration: int, batch_size: int, num_prompts: int, samples_per_prompt: int = 1
) -> list[int]:
    """Which prompts iteration `iteration` takes: every prompt once an epoch, in a new order each epoch.

    Args:
        seed: seed of the run.
        iteration: optimizer step, from 0.
        batch_size: samples an iteration, over all processes; a multiple of `samples_per_prompt`.
        num_prompts: length of the prompt list.
        samples_per_prompt: neighbouring samples that share a prompt.

    Returns:
        `batch_size` indices into the prompt list.
    """
    groups = batch_size // samples_per_prompt
    first = iteration * groups
    epochs = range(first // num_prompts, (first + groups - 1) // num_prompts + 1)
    order = [row for epoch in epochs for row in _permutation(seed, epoch, num_prompts)]
    offset = first - epochs[0] * num_prompts
    return [row for row in order[offset : offset + groups] for _ in range(samples_per_prompt)]


def fill_up(prompts: Sequence[str], pool: Sequence[str], number: int, seed: int) -> list[str]:
    """`prompts`, then others of `pool` up to `number`, drawn at random: neighbours in files are alike."""
    own = set(prompts)
    others = [prompt for prompt in pool if prompt not in own]
    missing = max(0, number - len(prompts))
    return [*prompts, *(others[row] for row in _permutation(seed, 0, len(others))[:missing])]


def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(((seed << 24) + epoch) % 2**63)
    return torch.randperm(length, generator=generator).tolist()


def _read(source: str, column: str, split: str, limit: int | None) -> list[object]:
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, column, split)
    if path.is_file():
        return _from_file(path, column)
    if path.suffix in SUFFIXES or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file or folder (a hub data set is written owner/name)")
    return _from_hub(source, column, split, limit)


def _from_file(path: Path, column: str) -> list[object]:
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [line for line in lines if line.strip()]
    if path.suffix == ".parquet":
        return _column(datasets.Dataset.from_parquet(str(path)), column)
    if path.suffix not in SUFFIXES:
        raise OSError(f"a file ends in one of {' '.join(SUFFIXES)}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".json":
            return _values(json.load(file), column)
        if path.suffix == ".jsonl":
            return _values([json.loads(line) for line in file if line.strip()], column)
        return _values(list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")), column)


def _values(rows: object, column: str) -> list[object]:
    """Strings as they are, and the value under `column` of objects."""
    if not isinstance(rows, list):
        raise OSError("a JSON file holds a list of strings or of objects")
    known = {key for row in rows if isinstance(row, dict) for key in row}
    if known and column not in known:
        raise OSError(_no_column(column, known))
    return [row.get(column) if isinstance(row, dict) else row for row in rows]


def _from_folder(path: Path, column: str, split: str) -> list[object]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        return _column(loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded, column)
    return _column(datasets.load_dataset(str(path), split=split), column)


def _from_hub(source: str, column: str, split: str, limit: int | None) -> list[object]:
    """A hub data set; streamed when only its first rows are wanted, as some hold pictures as well."""
    data = datasets.load_dataset(source, split=split, streaming=limit is not None)
    return _column(data if limit is None else data.take(limit), column)


def _column(data: datasets.Dataset | datasets.IterableDataset, column: str) -> list[object]:
    names: Sequence[str] = data.column_names or []
    if column not in names:
        raise OSError(_no_column(column, names))
    return [dict(row)[column] for row in data.select_columns([column])]


def _no_column(column: str, known: Iterable[str]) -> str:
    return f"no column {column!r}; it has {', '.join(map(repr, sorted(known)))}"
