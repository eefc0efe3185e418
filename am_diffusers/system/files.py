"""Files that are whole or not there, whatever is killed: written under another name, then renamed."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

ASSETS = Path(__file__).parents[1] / "assets"
"""The package's own models, prompts and images."""


class StorageError(ValueError):
    """A result can't be written; what was written before is kept."""


def write_whole(file: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` make `file` under a name that nobody else has, then rename it.

    Args:
        file: its folder is made if needed.
        write: makes the file at the path it gets.
        replace: whether an older file is replaced; else it stays, also when several write at the same time.

    Raises:
        StorageError: the disk is full or not writable; says what to do.
    """
    part = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        if replace:
            os.replace(part, file)
        else:
            with suppress(FileExistsError):
                os.link(part, file)
            part.unlink()
    except Exception as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        # safetensors wraps what the system said into an error of its own.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise StorageError(
                f"{file}: no space left on the disk: free some and run the same command again; everything "
                "written before is kept"
            ) from error
        if isinstance(error, OSError):
            raise StorageError(f"{file}: cannot be written: {error}") from error
        raise


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text, whole or not at all."""
    write_whole(file, lambda part: part.write_text(text, "utf-8", newline=""))


def write_json_once(file: Path, document: object) -> None:
    """Write a JSON document unless the file is there; NaN and infinity are refused."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(file, lambda part: part.write_text(text, "utf-8"), replace=False)


def asset_path(path: str) -> str:
    """`path` with a leading `asset:` replaced by the package's asset folder.

    Raises:
        ValueError: if the package ships no such asset.
    """
    if not path.startswith("asset:"):
        return path
    resolved = ASSETS / path.removeprefix("asset:")
    if not resolved.exists():
        shipped = ", ".join(sorted(p.name for p in ASSETS.iterdir())) if ASSETS.exists() else "none"
        raise ValueError(f"{path}: no such asset in {ASSETS} (shipped: {shipped})")
    return str(resolved)
