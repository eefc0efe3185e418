"""Results of others in an output folder: whose they are, and when they make room for those of a run.

A folder of the program's has the file `MARK`. Results of an earlier run go when the training begins or when
the new ones stand, whichever comes later, so that a run that can't begin loses nothing.
"""

import os
from pathlib import Path

from am_diffusers.models.lora_files import LORA_FILE
from am_diffusers.models.origin import read_origin
from am_diffusers.run.base_scores import CERTIFICATE, DIVERGENCE, FRONTIER
from am_diffusers.system.files import write_text
from am_diffusers.training.checkpoint_folder import Checkpoints

MARK = ".am_diffusers"
ERROR_FILE, STOPPED_FILE = "error.txt", "stopped"
NOTES = (ERROR_FILE, STOPPED_FILE)
EMA_FOLDER = "ema"
EMA_FILE = f"{EMA_FOLDER}/{LORA_FILE}"
ABOUT_LORA = ("evaluation.json", "README.md")
OF_A_FINISHED_RUN = (LORA_FILE, EMA_FILE, *ABOUT_LORA)
REPLACED = ("config.yaml", "tracker.json", "samples/pictures.json")
"""Files that the new ones replace at the beginning: nothing else need remove them."""
STALE = ("metrics.jsonl", "validation.jsonl", "samples/panel.png", DIVERGENCE, FRONTIER, CERTIFICATE)
NAMED = 5

State = tuple[int, int]
"""Inode and time of change of a file: another file of the same name has others."""


class FolderError(ValueError):
    """Error: a folder belongs to somebody else, and nothing is written there."""


def claim_folder(folder: Path, events: Path, *, overwrite: bool, resumable: bool) -> None:
    """Check that a folder may be written to, see `check_folder`, and mark it as a run's."""
    if not check_folder(folder, events, overwrite=overwrite, resumable=resumable):
        mark(folder)  # else when the training begins


def check_folder(folder: Path, events: Path, *, overwrite: bool, resumable: bool) -> bool:
    """Check that a folder may be written to; it is left as it is.

    Args:
        folder: output folder, which exists.
        events: folder of the tracker's event files.
        overwrite: whether results there may be replaced, whoever wrote them.
        resumable: whether the folder has checkpoints.

    Returns:
        Whether it holds results of others that are to be replaced.

    Raises:
        FolderError: it holds files of others that the run would replace, or the LoRA of a finished run.
    """
    run = read_origin(folder / LORA_FILE)
    ours = resumable or (folder / MARK).exists()
    held = [*_existing(folder, (*NOTES, *REPLACED)), *_stale(folder, events)] if not ours else []
    held += _existing(folder, OF_A_FINISHED_RUN)
    if not resumable and not overwrite and run is not None:
        raise FolderError(
            f"{folder} holds the LoRA of a finished run ({run.summary()}) and no checkpoints: choose another "
            "--output_dir, or start over with --overwrite_output_dir"
        )
    if not resumable and held:
        if not overwrite:
            names = [path.relative_to(folder).as_posix() for path in held]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise FolderError(
                f"{folder} holds {', '.join(names[:NAMED])}{more}, which this run would replace: move "
                "what is yours, choose another --output_dir, or pass --overwrite_output_dir"
            )
        return True
    return False


def find_refusal(folder: Path, events: Path, *, overwrite: bool) -> str | None:
    """Return why a run would refuse an output folder, which is left as it is; None if it would not."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{folder}: cannot write there: {there} is not a folder that can be written to"
    try:
        check_folder(folder, events, overwrite=overwrite, resumable=bool(Checkpoints(folder).list()))
    except FolderError as error:
        return str(error)
    return None


def mark(folder: Path) -> None:
    """Mark a folder as a run's."""
    write_text(folder / MARK, "A run of am_diffusers writes here.\n")


def leave_note(folder: Path, name: str, text: str) -> Path | None:
    """Write how a run ended into its folder; None if that is not marked or cannot be written."""
    if not (folder / MARK).exists():
        return None
    try:
        remove_notes(folder)
        (folder / name).write_text(text, "utf-8")
    except OSError:  # the disk may be what is wrong
        return None
    return folder / name


def remove_notes(folder: Path) -> None:
    """Remove the notes of an earlier attempt."""
    for name in NOTES:
        (folder / name).unlink(missing_ok=True)


def find_stale(folder: Path, events: Path) -> dict[Path, State]:
    """Return results that would pass for the new run's, with the state that they are in."""
    return {path: _state(path) for path in _stale(folder, events)}


def remove_stale(stale: dict[Path, State]) -> None:
    """Remove what the new run hasn't replaced since `find_stale`."""
    for path, state in stale.items():
        if path.exists() and _state(path) == state:
            path.unlink()


def remove_about_lora(folder: Path, *, averaged: bool) -> None:
    """Remove what tells of the LoRA that was just replaced, and its running mean if there is no new one."""
    for name in (*ABOUT_LORA, *([] if averaged else [EMA_FILE])):
        (folder / name).unlink(missing_ok=True)


def _stale(folder: Path, events: Path) -> list[Path]:
    grids = (folder / "samples").glob("iteration-[0-9]*.png")
    return [*_existing(folder, STALE), *sorted(grids), *sorted(events.glob("events.out.tfevents*"))]


def _existing(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _state(path: Path) -> State:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns
