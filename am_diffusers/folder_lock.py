"""The lock of an output folder: one run at a time writes there."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"


class FolderInUseError(ValueError):
    """Another run writes to the folder."""


def lock_folder(folder: Path) -> FileLock:
    """Take the lock of an output folder; the system lets it go when the process ends, however it does.

    Raises:
        FolderInUseError: another run has it; names its process.
    """
    lock = FileLock(folder / LOCK_FILE)
    owner = folder / (LOCK_FILE + ".owner")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = owner.read_text("utf-8").strip() if owner.exists() else "unknown"
        raise FolderInUseError(
            f"{folder} is in use by another run ({who}): wait for it, stop it, or choose another --output_dir"
        ) from error
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
    return lock
