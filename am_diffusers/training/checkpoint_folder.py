"""Checkpoints that outlive kills, full disks and flipped bytes.

    checkpoint-000050/
        ...              safetensors and JSON only, whatever the caller writes
        manifest.json    size and sha256 of every other file, written last

All files are written into a hidden folder beside it, flushed to the disk, and that folder is renamed: a
`checkpoint-...` is complete or was damaged afterwards, which the manifest shows. Older checkpoints are
removed once the new one is in place.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from am_diffusers.system.files import is_hidden, open_to_umask, sha256

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
SPARE_BYTES = 64 * 2**20  # left free for logs and images
_NAME = re.compile(r"checkpoint-(\d{6,})")
_HIDDEN = (".writing-", ".replaced-")


class CheckpointError(ValueError):
    """A checkpoint can't be trusted or can't be written; the message names the file and the remedy."""


class DiskFullError(CheckpointError):
    """No room for a checkpoint; those that exist are untouched."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in an output folder.

    Attributes:
        folder: where `checkpoint-...` folders lie; one run at a time may write there.
        total_limit: how many to keep, the oldest go first; None = all.
    """

    folder: Path
    total_limit: int | None = None

    def path(self, iteration: int) -> Path:
        """Return the place of the checkpoint after `iteration` optimizer steps."""
        return self.folder / f"checkpoint-{iteration:06d}"

    def list(self) -> list[Path]:
        """Return all checkpoints, the newest first, verified or not."""
        found = [path for path in self.folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: iteration_of(path), reverse=True)

    def latest(self) -> Path | None:
        """Return the newest checkpoint that verifies; the log names those passed over."""
        for path in self.list():
            try:
                verify(path)
            except CheckpointError as error:
                logger.warning("passed over: %s", error)
            else:
                return path
        return None

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.folder.glob(".*"):
            if path.name.startswith(_HIDDEN):
                shutil.rmtree(path, ignore_errors=True)

    def staging(self, iteration: int) -> Path:
        """Return the hidden folder that the files of a checkpoint are written to."""
        return self.folder / f"{_HIDDEN[0]}{iteration:06d}"

    def begin(self, iteration: int, expected_bytes: int) -> Path:
        """Make an empty hidden folder for the files of a checkpoint.

        Args:
            iteration: optimizer steps taken.
            expected_bytes: how much will be written, for a look at the free space before.

        Raises:
            DiskFullError: if they would not fit.
        """
        staging = self.staging(iteration)
        try:
            shutil.rmtree(staging, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < expected_bytes + SPARE_BYTES:
                raise DiskFullError(
                    f"{self.folder}: a checkpoint takes {expected_bytes / 2**20:.0f} MB and "
                    f"{SPARE_BYTES / 2**20:.0f} MB are kept free, but {free / 2**20:.0f} MB are left: free "
                    "some space, or lower --checkpoints_total_limit"
                )
            staging.mkdir()
        except OSError as error:
            raise self.no_room(error) from error
        return staging

    def publish(self, iteration: int) -> Path:
        """Write the manifest, rename the folder to its place, then remove the oldest ones.

        Raises:
            DiskFullError: if it could not be completed.
        """
        staging, target = self.staging(iteration), self.path(iteration)
        try:
            seal(staging, iteration)
            if target.exists():  # damaged, or the same iteration done again
                replaced = self.folder / f"{_HIDDEN[1]}{iteration:06d}"
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(target, replaced)
            os.replace(staging, target)
            _flush(self.folder)
        except OSError as error:
            raise self.no_room(error) from error
        self.clean()
        if self.total_limit is not None:
            # A newer one is damaged: this run didn't go on from it.
            own = [path for path in self.list() if iteration_of(path) <= iteration]
            for old in own[self.total_limit :]:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def no_room(self, error: Exception) -> DiskFullError:
        """Return an error of the file system in words; what was half-written is removed to give room."""
        self.clean()
        return DiskFullError(
            f"{self.folder}: cannot write a checkpoint ({error}): free some space or check the permissions; "
            "checkpoints that exist are untouched"
        )


def iteration_of(path: Path) -> int:
    """Return the number in a checkpoint's name.

    Raises:
        CheckpointError: if it isn't named like one.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named checkpoint-NUMBER: pass such a folder, or 'latest'")
    return int(match[1])


def seal(folder: Path, iteration: int) -> None:
    """Flush the files of `folder` to the disk and write their manifest."""
    open_to_umask(folder)
    files = {}
    for path in _own_files(folder):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    text = json.dumps({"format": FORMAT, "iteration": iteration, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")
    _flush(folder / MANIFEST)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush(path)


def verify(folder: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        CheckpointError: naming the file that is missing, changed, or doesn't belong there.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files, number, version = manifest["files"], manifest["iteration"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or damaged ({error!r})") from error
    if version != FORMAT:
        raise CheckpointError(f"{folder}: format {version}, this version reads format {FORMAT}")
    if number != iteration_of(folder):
        raise CheckpointError(f"{folder} holds iteration {number}: it was renamed")
    present = {path.relative_to(folder).as_posix() for path in _own_files(folder)} - {MANIFEST}
    for name in sorted(present - set(files)):
        raise CheckpointError(f"{folder / name} does not belong to this checkpoint: remove it")
    for name, expected in sorted(files.items()):
        path = folder / name
        if name not in present:
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['size']}")
        if sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} was changed: its sha256 is not the manifest's")


def _own_files(folder: Path) -> list[Path]:
    """Return what isn't a folder, but for hidden files: systems leave them there, and none is ever read."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and not is_hidden(path, folder))


def _flush(path: Path) -> None:
    """Make the disk hold a file, or a folder's entries, and wait for it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
