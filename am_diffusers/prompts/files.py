"""Rows of prompt lists, the same for training and evaluation: files, data set folders, hub data sets."""

import dataclasses
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from datasets.table import table_cast
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from am_diffusers.prompts.rows import Data, Rows, head, is_media
from am_diffusers.prompts.text_files import TEXT_SUFFIXES, read_rows

UNREADABLE = (OSError, ValueError, KeyError, DatasetsError)
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
# Of a folder; what `datasets` takes for JSON may be lines of it.
READ_HERE = tuple(suffix for suffix in SUFFIXES if suffix != ".json")


def open_rows(source: str, *, split: str | None, limit: int | None = None) -> Rows:
    """Open the rows of a file, a data set folder or a hub data set, in their order.

    Args:
        source: txt, jsonl, json, csv, tsv or parquet file; a folder that `datasets` reads; or a hub id.
        split: split of a folder or hub data set; None = the only one there is.
        limit: number of rows to read, the first ones; files may give more, None = all.

    Raises:
        OSError, ValueError, KeyError, DatasetsError: `UNREADABLE`, with a message for users.
    """
    path = Path(source)
    if path.is_dir():
        return head(_from_folder(path, split), limit)
    if path.is_file():
        return head(_from_file(path), limit)
    if path.suffix in SUFFIXES or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file or folder (a hub data set is written owner/name)")
    return _from_hub(source, split, limit)


def download_command(hub_id: str, *, files: Sequence[str] = (), revision: str | None = None) -> str:
    """Return the shell command that puts a hub data set, or some of its files, into the local cache."""
    words = ["hf", "download", "--repo-type", "dataset", hub_id, *files]
    return shlex.join(words if revision is None else [*words, "--revision", revision])


def _from_file(path: Path) -> Rows:
    if path.suffix not in SUFFIXES:
        raise OSError(f"a file ends in one of {' '.join(SUFFIXES)}")
    return _from_parquet(path) if path.suffix == ".parquet" else read_rows(path)


def _from_parquet(path: Path, features: datasets.Features | None = None) -> datasets.Dataset:
    """Read a parquet file but for columns of media and bytes; nothing is written to a cache."""
    try:
        with pq.ParquetFile(path) as file:
            known = {**datasets.Features.from_arrow_schema(file.schema_arrow), **(features or {})}
            plain = [name for name in file.schema_arrow.names if not is_media(known[name])]
            table = file.read(columns=plain).select(plain).combine_chunks()
        table.validate(full=True)
        schema = datasets.Features({name: known[name] for name in plain}).arrow_schema
        return datasets.Dataset(table_cast(table, schema))
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _from_folder(path: Path, split: str | None, *, streaming: bool = False) -> Rows:
    """Read a folder; its files are read as those that are named themselves, where they are of one kind."""
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            return loaded[split or _only_split(loaded)]
        return loaded
    with TemporaryDirectory() as cache:
        builder = datasets.load_dataset_builder(str(path), cache_dir=cache)
    splits = builder.config.data_files or {}
    split = split or _only_split(splits)
    files = [Path(file) for file in splits.get(split, ())]
    if not _are_read_here(files, builder.config):
        return _load(str(path), split, streaming=streaming)
    parts = [_part(file, builder.info.features) for file in files]
    tables = [part for part in parts if isinstance(part, datasets.Dataset)]
    return datasets.concatenate_datasets(tables) if tables else [row for part in parts for row in part]


def _are_read_here(files: Sequence[Path], config: datasets.BuilderConfig) -> bool:
    """Tell if files are of one kind, and nothing is said about how to read them, such as a separator."""
    suffixes = {file.suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= set(READ_HERE):
        return False
    usual = type(config)()
    places = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    expected = {f.name: getattr(usual, f.name) for f in dataclasses.fields(usual) if f.name not in places}
    expected |= {"sep": "\t"} if suffixes == {".tsv"} else {}
    return all(getattr(config, name) == value for name, value in expected.items())


def _part(file: Path, features: datasets.Features | None) -> list[object] | datasets.Dataset:
    """Read one of a folder's files; texts are a column `text` then, as `datasets` calls it."""
    try:
        if file.suffix == ".parquet":
            return _from_parquet(file, features)
        return [{"text": row} if isinstance(row, str) else row for row in read_rows(file)]
    except UNREADABLE as error:
        raise OSError(f"{file.name}: {error}") from error


def _from_hub(hub_id: str, split: str | None, limit: int | None) -> Rows:
    """Load a hub data set; streamed when only its first rows are wanted, as some hold images as well."""
    folder, streaming = _downloaded(hub_id), limit is not None
    try:
        if folder is None:
            data: Rows = _load(hub_id, split, streaming=streaming)
        else:
            data = _from_folder(Path(folder), split, streaming=streaming)
    except ConnectionError as error:
        raise OSError(f"{error}: where there is a network, run {download_command(hub_id)}") from error
    rows = head(data, limit)
    # Streamed csv knows its rows alone.
    return rows if isinstance(rows, list) or rows.column_names else [dict(row) for row in rows]


def _downloaded(hub_id: str) -> str | None:
    """Return, offline, the folder that `hf download` made: `datasets` looks only into a cache of its own."""
    if not is_offline_mode():
        return None
    try:
        return snapshot_download(hub_id, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _load(place: str, split: str | None, *, streaming: bool) -> Data:
    try:
        split = split or _only_split(datasets.get_dataset_split_names(place))
        return _as_data(datasets.load_dataset(place, split=split, streaming=streaming))
    except ConnectionError:
        raise
    except UNREADABLE as error:
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            raise
        raise OSError(
            f"the Hugging Face cache {cache} can't be written: set HF_DATASETS_CACHE to a folder that can"
        ) from error


def _only_split(splits: Iterable[object]) -> str:
    names = [str(name) for name in splits]
    if len(names) != 1:
        raise OSError(f"name one of its splits: {', '.join(names)}")
    return names[0]


def _as_data(loaded: object) -> Data:
    assert isinstance(loaded, datasets.Dataset | datasets.IterableDataset)  # a split was named
    return loaded
