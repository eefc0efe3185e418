"""Files that are whole or not there, whatever is killed: written under another name, then renamed."""

import codecs
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

ASSETS = Path(__file__).parents[1] / "assets"
"""The package's own models, prompts and images."""
DECLARATION = "am_diffusers.json"
"""File of a model folder that says what the model was made for."""

# Encodings by the bytes a file begins with; UTF-32 first, which begins as UTF-16 does.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class StorageError(ValueError):
    """A result can't be written; what was written before is kept."""


def write_whole(file: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` make `file` under a name that nobody else has, then rename it.

    Args:
        file: file to write; the folder is made if needed.
        write: makes the file at the path it gets.
        replace: whether an older file is replaced; else it stays, also when several write at the same time.

    Raises:
        StorageError: the disk is full or not writable; says what to do.
    """
    part = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # writers with a temporary file of their own leave it private
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


def open_to_umask(folder: Path) -> None:
    """Give each file in a folder the mode that the umask leaves: some writers' files are private."""
    probe = folder / f".{uuid4().hex}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text, whole or not at all."""
    write_whole(file, lambda part: part.write_text(text, "utf-8", newline=""))


def write_json(file: Path, document: object, *, once: bool = False) -> None:
    """Write a JSON document, whole or not at all; NaN and infinity are refused.

    Args:
        file: file to write; the folder is made if needed.
        document: plain values.
        once: whether a file that is there stays as it is.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(file, lambda part: part.write_text(text, "utf-8", newline=""), replace=not once)


def write_image(file: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    write_whole(file, lambda part: image.save(part, format="PNG"))


def write_lines(file: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write a JSON-lines file, whole or not at all; NaN and infinity are refused."""
    write_text(file, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_utf8(file: Path) -> str:
    """Read a UTF-8 text with its line ends as they are, without a byte order mark.

    Raises:
        ValueError: it is in another encoding: names it, or the line, counted from 1.
    """
    content = file.read_bytes()
    name = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if name is not None:
        raise ValueError(f"it is {name}: save it as UTF-8, for example by `iconv -f {name} -t UTF-8`")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ValueError(f"line {line} isn't UTF-8 (byte {byte:#04x}): save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL character, as UTF-16 does: save the file as UTF-8")
    return text


def read_lines(file: Path) -> list[dict[str, float]]:
    """Read a metrics.jsonl or validation.jsonl: its lines, each with its iteration; none without the file.

    A last line that a running or killed process hasn't finished is left out.
    """
    if not file.exists():
        return []
    text = file.read_text("utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def keep_lines(file: Path, before: int) -> None:
    """Drop the lines of a JSON-lines file from iteration `before` on, and one that a kill cut short."""
    kept = []
    for line in file.read_text("utf-8").split("\n") if file.exists() else []:
        try:
            if json.loads(line)["iteration"] < before:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            break  # cut short
    write_text(file, "".join(kept))


def is_hidden(file: Path, folder: Path) -> bool:
    """Tell if a file below a folder is hidden, as what systems leave there: .DS_Store, ._x.png, .nfs0012."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def sha256(file: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sha256_of_text(text: str) -> str:
    """Return the hexadecimal sha256 of a text."""
    return sha256_of_bytes(text.encode("utf-8", "surrogatepass"))


def sha256_of_bytes(content: bytes) -> str:
    """Return the hexadecimal sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def digest(values: object) -> str:
    """Return a short fingerprint of plain JSON values, 16 hexadecimal digits."""
    return sha256_of_text(json.dumps(values, sort_keys=True))[:16]


def asset_path(path: str) -> str:
    """Return `path` with a leading `asset:` replaced by the package's asset folder.

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


def read_declaration(path: str) -> dict[str, Any]:
    """Read what a model folder says about itself in `am_diffusers.json`: max_sequence_length, rewards.

    Raises:
        ValueError: if the file is there and isn't a JSON object.
    """
    file = Path(path) / DECLARATION
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found
