"""Checkpoint folders: published whole, refused when damaged, rotated, never half-written."""

import errno
import os
import shutil

import pytest

from am_diffusers.training import checkpoint_folder as checkpoint
from am_diffusers.training.checkpoint_folder import CheckpointError, Checkpoints, DiskFullError, verify


def write(checkpoints, iteration, text="content"):
    folder = checkpoints.begin(iteration, 10)
    (folder / "state.json").write_text(text)
    (folder / "ema").mkdir()
    (folder / "ema/weights.safetensors").write_bytes(b"\x00" * 100)
    return checkpoints.publish(iteration)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, total_limit=2)


def test_newest_sound_checkpoint_is_found_and_old_ones_go(checkpoints):
    assert checkpoints.latest() is None
    for iteration in (2, 4, 10):
        write(checkpoints, iteration)
    assert [path.name for path in checkpoints.list()] == ["checkpoint-000010", "checkpoint-000004"]
    assert checkpoints.latest() == checkpoints.path(10)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    r"state\.json was changed": lambda folder: flip(folder / "state.json"),
    r"weights\.safetensors has 50 bytes instead of 100": lambda folder: os.truncate(
        folder / "ema/weights.safetensors", 50
    ),
    r"state\.json is missing": lambda folder: (folder / "state.json").unlink(),
    r"extra\.pkl does not belong": lambda folder: (folder / "ema/extra.pkl").write_bytes(b"\x80\x04."),
    r"manifest\.json: missing or damaged": lambda folder: (folder / "manifest.json").write_text("{"),
    r"manifest.json: missing": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_refused_by_name_and_the_one_before_is_taken(checkpoints, caplog, message):
    write(checkpoints, 2)
    DAMAGE[message](write(checkpoints, 4))
    with pytest.raises(CheckpointError, match=message):
        verify(checkpoints.path(4))
    assert checkpoints.latest() == checkpoints.path(2)
    assert "checkpoint-000004" in caplog.text


@pytest.mark.parametrize("name", [".DS_Store", "._state.json", "ema/.nfs00000000012a"])
def test_what_systems_leave_in_a_checkpoint_is_no_part_of_it(checkpoints, name):
    folder = checkpoints.begin(2, 10)
    (folder / "ema").mkdir()
    (folder / "state.json").write_text("content")
    (folder / name).write_bytes(b"left")
    found = checkpoints.publish(2)
    verify(found)
    (found / name).unlink()
    assert checkpoints.latest() == found
    (found / name).write_bytes(b"left again")
    assert checkpoints.latest() == found


def test_renamed_checkpoint_is_refused(checkpoints):
    shutil.copytree(write(checkpoints, 2), checkpoints.path(8))
    with pytest.raises(CheckpointError, match="holds iteration 2: it was renamed"):
        verify(checkpoints.path(8))
    with pytest.raises(CheckpointError, match="not named checkpoint-NUMBER"):
        checkpoint.iteration_of(checkpoints.folder / "mine")


def test_a_damaged_checkpoint_is_replaced_when_its_iteration_comes_again(checkpoints):
    flip(write(checkpoints, 2) / "state.json")
    write(checkpoints, 2, "again")
    verify(checkpoints.path(2))
    assert (checkpoints.path(2) / "state.json").read_text() == "again"
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-000002"]


def test_a_newer_damaged_checkpoint_does_not_push_out_the_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, total_limit=1)
    write(checkpoints, 9)
    flip(write(Checkpoints(tmp_path), 12) / "state.json")
    write(checkpoints, 10)
    assert checkpoints.latest() == checkpoints.path(10)
    assert not checkpoints.path(9).exists()


def test_leftovers_of_a_kill_are_cleaned_and_never_taken(checkpoints):
    write(checkpoints, 2)
    (checkpoints.begin(4, 0) / "state.json").write_text("half")
    assert checkpoints.latest() == checkpoints.path(2)
    checkpoints.clean()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-000002"]


def test_free_space_is_looked_at_before(checkpoints, monkeypatch):
    write(checkpoints, 2)
    usage = shutil.disk_usage(checkpoints.folder)._replace(free=70 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskFullError, match=r"takes 10 MB and 64 MB are kept free, but 70 MB are left"):
        checkpoints.begin(4, 10 * 2**20)
    assert checkpoints.latest() == checkpoints.path(2)


@pytest.mark.parametrize("place", ["mkdir", "manifest", "rename"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(checkpoints, monkeypatch, place):
    write(checkpoints, 2)

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "rename":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(f"pathlib.Path.{'mkdir' if place == 'mkdir' else 'write_text'}", full)

    def write_next():
        folder = checkpoints.begin(4, 0)
        with (folder / "state.json").open("w") as file:
            file.write("content")
        checkpoints.publish(4)

    with pytest.raises(DiskFullError, match="No space left on device"):
        write_next()
    monkeypatch.undo()
    assert checkpoints.latest() == checkpoints.path(2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-000002"]
