"""Trackers continue a resumed run, show its config and its pictures."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from finetune_runs import tiny_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_diffusers import trackers
from am_diffusers.command_line import parse_config
from am_diffusers.plan import make_plan
from am_diffusers.trackers import flatten, log_images, start_trackers


def start_tensorboard(folder, resume_iteration):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder / "logs")
    start_trackers(
        accelerator,
        folder=folder,
        logging_dir=folder / "logs",
        config={"rank": 4, "rewards": [{"name": "pickscore", "revision": None}]},
        resume_iteration=resume_iteration,
    )
    return accelerator


def stop(accelerator):
    for tracker in accelerator.trackers:
        tracker.finish()


def scalars(folder, name):
    events = EventAccumulator(str(folder / "logs/am_diffusers")).Reload().Scalars(name)
    return [(event.step, event.value) for event in events]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    """Steps 0 .. 5 were logged when the run died, its checkpoint is that of 3 iterations."""
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "samples/iteration-000003.png")
    lines = [{"iteration": i, "validation/hpsv2_gain": i / 10} for i in (0, 3)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    died = start_tensorboard(tmp_path, 0)
    for iteration in range(6):
        if iteration in (0, 3):
            died.log({"validation/hpsv2_gain": iteration / 10}, iteration)
            log_images(died, {"validation/samples": Image.new("RGB", (8, 8))}, iteration)
        died.log({"loss": float(iteration)}, iteration)
    stop(died)
    resumed = start_tensorboard(tmp_path, 3)
    for iteration in range(3, 8):
        resumed.log({"loss": 100.0 + iteration}, iteration)
    stop(resumed)
    assert scalars(tmp_path, "loss") == [(0, 0), (1, 1), (2, 2), *((i, 100 + i) for i in range(3, 8))]
    assert scalars(tmp_path, "validation/hpsv2_gain") == [(0, 0), (3, pytest.approx(0.3))]
    events = EventAccumulator(str(tmp_path / "logs/am_diffusers")).Reload()
    assert [image.step for image in events.Images("validation/samples")] == [0, 3]


def test_a_new_tensorboard_run_has_its_config_in_one_folder(tmp_path):
    accelerator = start_tensorboard(tmp_path, 0)
    accelerator.log({"loss": 1.0}, 0)
    stop(accelerator)
    assert len(list((tmp_path / "logs").rglob("events*"))) == 1
    events = EventAccumulator(str(tmp_path / "logs/am_diffusers")).Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"rewards/0/name" in content
    assert b"pickscore" in content


def test_pictures_are_logged_as_they_are(tmp_path):
    accelerator = start_tensorboard(tmp_path, 0)
    log_images(accelerator, {"panel": Image.new("RGB", (30, 20), "red")}, 4)
    stop(accelerator)
    (image,) = EventAccumulator(str(tmp_path / "logs/am_diffusers")).Reload().Images("panel")
    assert (image.step, image.width, image.height) == (4, 30, 20)


class FakeTracker:
    """What accelerate's trackers have."""

    def __init__(self, name):
        self.name, self.config, self.images = name, None, []

    def store_init_configuration(self, values):
        self.config = values

    def log_images(self, values, step):
        self.images.append((values, step))


def start_fake(folder, name, resume_iteration, *, is_main=True):
    """Arguments of the tracker's start, and the tracker."""
    started = []
    accelerator = SimpleNamespace(
        is_main_process=is_main,
        log_with=[name],
        trackers=[FakeTracker(name)],
        init_trackers=lambda project, init_kwargs: started.append(init_kwargs),
    )
    start_trackers(
        accelerator,  # pyright: ignore[reportArgumentType]
        folder=folder,
        logging_dir=folder / "logs",
        config={"rank": 4},
        resume_iteration=resume_iteration,
    )
    return [arguments[name] for arguments in started], accelerator


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_continues_under_its_id_and_a_new_one_gets_another(tmp_path, name, key):
    (first,), accelerator = start_fake(tmp_path, name, 0)
    (again,), _ = start_fake(tmp_path, name, 7)
    (new,), _ = start_fake(tmp_path, name, 0)
    assert first == again
    assert first["resume"] == "allow"
    assert new[key] != first[key]
    assert accelerator.trackers[0].config == {"rank": 4}
    assert start_fake(tmp_path, name, 0, is_main=False)[0] == []


def test_a_run_may_be_resumed_with_another_tracker(tmp_path):
    start_fake(tmp_path, "wandb", 0)
    (other,), _ = start_fake(tmp_path, "trackio", 5)
    assert json.loads((tmp_path / "tracker.json").read_text()).keys() == {"wandb", "trackio"}
    assert other["name"].startswith(tmp_path.name)


def test_wandb_gets_pictures_at_their_step(tmp_path):
    _, accelerator = start_fake(tmp_path, "wandb", 0)
    picture = Image.new("RGB", (8, 8))
    log_images(accelerator, {"panel": picture}, 4)  # pyright: ignore[reportArgumentType]
    assert accelerator.trackers[0].images == [({"panel": [picture]}, 4)]


def test_flat_values_keep_their_types():
    nested = {"a": 1, "b": [{"c": None, "d": 0.5}], "e": [], "f": [True, "x"], "g": {"h": "i"}}
    flat = {"a": 1, "b/0/c": "null", "b/0/d": 0.5, "e": "[]", "f/0": True, "f/1": "x", "g/h": "i"}
    assert flatten(nested) == flat


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_an_error_that_says_how_to_install_it(tiny_sd3_dir, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    own = {"rewards": [{"name": "brightness"}], "eval_rewards": [{"name": "symmetry"}]}
    path = tiny_config(tiny_sd3_dir, tmp_path, **own)
    with pytest.raises(ValueError, match=rf'--report_to {name} .*pip install "am_diffusers\[{name}\]"'):
        make_plan(parse_config(["--config", str(path), "--report_to", name]), 1)
    make_plan(parse_config(["--config", str(path), "--report_to", "none"]), 1)
