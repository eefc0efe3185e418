"""Text files that are there whole or not at all, whoever reads them meanwhile or kills the writer."""

import os
import tempfile
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write `file` as UTF-8, in place of what was there, once all of it is on the disk.

    Raises:
        OSError: if it can't be written; what was there before stays.
    """
    handle, part = tempfile.mkstemp(prefix=f".{file.name}-", suffix=".part", dir=file.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files for the owner only; results are for whoever may read the folder.
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
