"""Checkpoints of several processes, each with a part of its own: written together or not at all."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from test_processes import run_both

from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.system.processes import is_secondhand
from am_diffusers.training import checkpoint as saver
from am_diffusers.training.checkpoint import Outdated, Saver
from am_diffusers.training.checkpoint_folder import CheckpointError, Checkpoints, DiskFullError, verify


class Numbered:
    """A method whose local part is one tensor of `size` numbers; it notes what is handed back to it."""

    def __init__(self, index: int, size: int = 3) -> None:
        self.index, self.size = index, size
        self.restored: tuple = ()
        self.told = False

    def state_dict(self):
        return {"common": 1.5}

    def load_state_dict(self, state):
        assert state == {"common": 1.5}
        self.told = True

    def local_state_dict(self):
        return {"part": torch.full((self.size,), float(self.index))} if self.size else {}

    def load_local_state_dicts(self, states, share):
        self.restored = ([state["part"].tolist() for state in states], share)


STATE = {"parameters": {}}


def make_saver(folder, processes, method=None, policy="stop"):
    state = SimpleNamespace(iteration=3, state_dict=lambda: STATE, load_state_dict=lambda state: None)
    method = method or Numbered(processes.index)
    return Saver(Checkpoints(folder), processes, state, method, {}, lambda folder: None, policy)


@pytest.fixture
def written(tmp_path):
    assert run_both(lambda processes: make_saver(tmp_path, processes).save()) == [None, None]
    return tmp_path / "checkpoint-000003"


def test_every_process_writes_its_part_before_the_manifest(written):
    verify(written)
    names = [path.name for path in sorted(written.glob("local-*.json"))]
    assert names == ["local-00000-of-00002.json", "local-00001-of-00002.json"]


@pytest.mark.parametrize(
    ("number", "needed"),
    [(1, [[0, 1]]), (2, [[0], [1]]), (3, [[0], [0, 1], [1]]), (4, [[0], [0], [1], [1]])],
)
def test_each_of_any_number_of_processes_reads_the_parts_it_needs_and_no_other(
    written, monkeypatch, number, needed
):
    read, original = [], saver.load_state
    monkeypatch.setattr(saver, "load_state", lambda *args: read.append(args[1]) or original(*args))
    for rank in range(number):
        read.clear()
        method = Numbered(rank)
        processes = SimpleNamespace(index=rank, number=number, is_main=rank == 0)
        make_saver(written.parent, processes, method).restore(written)
        assert read == ["state", *(f"local-{part:05d}-of-00002" for part in needed[rank])]
        assert method.restored == ([[float(part)] * 3 for part in needed[rank]], PartShare(rank, number, 2))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_shares_of_all_ranks_are_all_samples_once_in_order(parts, ranks):
    saved, found = torch.arange(12).chunk(parts), []
    for rank in range(ranks):
        share = PartShare(rank, ranks, parts)
        own = torch.cat([saved[part] for part in share.needed])
        picked = own[share.rows(len(own))]
        assert len(picked) == 12 // ranks
        assert all(set(saved[part].tolist()) & set(picked.tolist()) for part in share.needed)
        found += picked.tolist()
    assert found == list(range(12))


def test_samples_that_cannot_be_shared_are_an_error_that_says_how_to_go_on():
    with pytest.raises(ValueError, match="6 samples saved by 2 processes can't be shared by 4: go on with"):
        PartShare(1, 4, 2).rows(3)  # of each part


def test_parts_made_with_other_settings_are_dropped_with_one_warning(written, caplog):
    for rank in range(2):
        method = Numbered(rank)
        processes = SimpleNamespace(index=rank, number=2, is_main=rank == 0)
        outdated = Outdated(rows=["pairing", "loss_steps"])
        make_saver(written.parent, processes, method).restore(written, outdated=outdated)
        assert method.restored == ()
        assert method.told
    (record,) = caplog.records
    assert "with another pairing, loss_steps and are dropped: the buffer starts empty" in record.message


def test_running_means_of_other_settings_start_anew_with_one_warning(written, caplog):
    for rank in range(2):
        method = Numbered(rank)
        processes = SimpleNamespace(index=rank, number=2, is_main=rank == 0)
        outdated = Outdated(means=["reward_scale"])
        make_saver(written.parent, processes, method).restore(written, outdated=outdated)
        assert not method.told
        assert method.restored != ()
    (record,) = caplog.records
    assert "counts and running means of its method are those of another reward_scale" in record.message


def test_a_method_without_local_state_writes_no_such_files(tmp_path):
    run_both(lambda processes: make_saver(tmp_path, processes, Numbered(processes.index, 0)).save())
    assert not list(tmp_path.glob("*/local-*"))
    method = Numbered(0)
    make_saver(tmp_path, SimpleNamespace(index=0, number=1, is_main=True), method).restore(
        tmp_path / "checkpoint-000003"
    )
    assert method.restored == ()


def test_free_space_counts_the_parts_of_all_processes(tmp_path, monkeypatch):
    expected = []
    begin = Checkpoints.begin

    def noted(self, iteration, size):
        expected.append(size)
        return begin(self, iteration, size)

    monkeypatch.setattr(Checkpoints, "begin", noted)
    run_both(lambda processes: make_saver(tmp_path, processes, Numbered(processes.index, 1000)).save())
    assert expected == [2 * 4000]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_without_room_for_its_part_ends_the_checkpoint_of_all(tmp_path, monkeypatch, policy, index):
    def full(folder, name, state):
        if name.startswith(f"local-{index:05d}"):
            raise OSError("No space left on device")
        return original(folder, name, state)

    original = saver.save_state
    monkeypatch.setattr("am_diffusers.training.checkpoint.save_state", full)
    results = run_both(lambda processes: make_saver(tmp_path, processes, policy=policy).save())
    assert list(tmp_path.iterdir()) == []
    if policy == "skip":
        assert results == [None, None]
    else:
        assert isinstance(results[index], DiskFullError)
        assert "No space left" in str(results[index])
        assert type(results[1 - index]) is CheckpointError
        assert is_secondhand(results[1 - index])


def test_a_part_that_cannot_be_saved_ends_the_checkpoint_of_all(tmp_path):
    def work(processes):
        method = Numbered(processes.index)
        if processes.index:
            method.local_state_dict = lambda: {"part": object()}
        make_saver(tmp_path, processes, method).save()

    main, other = run_both(work)
    assert type(main) is CheckpointError
    assert "local-00001-of-00002.part is a object" in str(other)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_processes_that_do_not_see_the_same_folder_are_told(tmp_path):
    def work(processes):
        folder = tmp_path / str(processes.index)
        folder.mkdir()
        make_saver(folder, processes).save()

    _, other = run_both(work)
    assert "do all processes see the same folder?" in str(other)
    shutil.rmtree(tmp_path)
