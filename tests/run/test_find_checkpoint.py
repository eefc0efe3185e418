"""Where the checkpoint to resume from is looked for."""

import pytest
from accelerate import Accelerator

from am_diffusers.run.resume import find_checkpoint
from am_diffusers.system.processes import Processes
from am_diffusers.training.checkpoint_folder import CheckpointError, Checkpoints


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    found = Checkpoints(tmp_path / "out")
    (found.begin(1, 10) / "state.json").write_text("{}")
    found.publish(1)
    return found


@pytest.mark.parametrize(
    "wanted", ["latest", "checkpoint-000001", "checkpoint-000001/", "out/checkpoint-000001"]
)
def test_a_checkpoint_is_named_by_its_path_or_its_name_in_the_output_folder(checkpoints, wanted):
    found = find_checkpoint(checkpoints, wanted, Processes(Accelerator(cpu=True)))
    assert found is not None
    assert found.resolve() == checkpoints.path(1)


def test_a_checkpoint_that_is_nowhere_says_where_it_was_looked_for(checkpoints):
    message = f"checkpoint-000002: no such folder, nor one in {checkpoints.folder}; pass latest, or a check"
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(checkpoints, "checkpoint-000002", Processes(Accelerator(cpu=True)))
