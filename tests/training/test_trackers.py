"""Trackers continue a resumed run, show its config and its pictures."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import am_diffusers.training.trackers
from am_diffusers.config.command_line import parse_config
from am_diffusers.run.plan import make_plan
from am_diffusers.training.trackers import flatten, start_trackers
from finetune_runs import tiny_config


def start_tensorboard(folder, resume_iteration):
    return start_trackers(
        Accelerator(cpu=True, log_with="tensorboard", project_dir=folder / "logs"),
        folder=folder,
        logging_dir=folder / "logs",
        config={"rank": 4, "rewards": [{"name": "pickscore", "revision": None}]},
        resume_iteration=resume_iteration,
    )


def stop(trackers):
    for tracker in trackers.accelerator.trackers:
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
            died.log_images({"validation/samples": Image.new("RGB", (8, 8))}, iteration)
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
    trackers = start_tensorboard(tmp_path, 0)
    trackers.log({"loss": 1.0}, 0)
    stop(trackers)
    assert len(list((tmp_path / "logs").rglob("events*"))) == 1
    events = EventAccumulator(str(tmp_path / "logs/am_diffusers")).Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"rewards/0/name" in content
    assert b"pickscore" in content


def test_pictures_are_logged_as_they_are(tmp_path):
    trackers = start_tensorboard(tmp_path, 0)
    trackers.log_images({"panel": Image.new("RGB", (30, 20), "red")}, 4)
    stop(trackers)
    (image,) = EventAccumulator(str(tmp_path / "logs/am_diffusers")).Reload().Images("panel")
    assert (image.step, image.width, image.height) == (4, 30, 20)


class FakeTracker:
    """What accelerate's trackers have."""

    def __init__(self, name):
        self.name, self.config, self.logged = name, None, []

    def store_init_configuration(self, values):
        self.config = values

    def log_images(self, values, step):
        self.logged.append((step, values))


def start_fake(folder, name, resume_iteration, *, is_main=True):
    """Arguments of the tracker's start (none = not started), the tracker and the trackers."""
    started, tracker = [], FakeTracker(name)
    accelerator = SimpleNamespace(
        is_main_process=is_main,
        log_with=[name],
        trackers=[tracker] if is_main else [],
        init_trackers=lambda project, init_kwargs: started.append(init_kwargs[name]),
        log=lambda values, step: tracker.logged.append((step, values)),
    )
    trackers = start_trackers(
        accelerator,  # pyright: ignore[reportArgumentType]
        folder=folder,
        logging_dir=folder / "logs",
        config={"rank": 4},
        resume_iteration=resume_iteration,
    )
    return started, tracker, trackers


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_continues_under_its_id_and_a_new_one_gets_another(tmp_path, name, key):
    (first,), tracker, _ = start_fake(tmp_path, name, 0)
    (again,), *_ = start_fake(tmp_path, name, 7)
    (new,), *_ = start_fake(tmp_path, name, 0)
    assert first == again
    assert first["resume"] == "allow"
    assert new[key] != first[key]
    assert tracker.config == {"rank": 4}


def test_only_the_main_process_starts_a_tracker(tmp_path):
    started, tracker, trackers = start_fake(tmp_path, "wandb", 0, is_main=False)
    trackers.log_images({"panel": Image.new("RGB", (8, 8))}, 0)
    assert (started, tracker.logged, list(tmp_path.iterdir())) == ([], [], [])


def test_a_run_may_be_resumed_with_another_tracker(tmp_path):
    start_fake(tmp_path, "wandb", 0)
    (other,), *_ = start_fake(tmp_path, "trackio", 5)
    assert json.loads((tmp_path / "tracker.json").read_text()).keys() == {"wandb", "trackio"}
    assert other["name"].startswith(tmp_path.name)


def test_a_resumed_tracker_does_not_get_again_what_it_has(tmp_path):
    """The run died after iterations 0 .. 5 and goes on at 3."""
    lines = "".join(f'{{"iteration": {i}}}\n' for i in range(6))
    (tmp_path / "metrics.jsonl").write_text(lines)
    _, tracker, trackers = start_fake(tmp_path, "wandb", 3)
    picture = Image.new("RGB", (8, 8))
    for iteration in range(3, 8):
        trackers.log_images({"panel": picture}, iteration)
        trackers.log({"loss": 1.0}, iteration)
    images, losses = {"panel": [picture]}, {"loss": 1.0}
    assert tracker.logged == [(6, images), (6, losses), (7, images), (7, losses)]
    _, tracker, trackers = start_fake(tmp_path, "wandb", 0)
    trackers.log({"loss": 1.0}, 0)
    assert tracker.logged == [(0, losses)]


def test_flat_values_keep_their_types():
    nested = {"a": 1, "b": [{"c": None, "d": 0.5}], "e": [], "f": [True, "x"], "g": {"h": "i"}}
    flat = {"a": 1, "b/0/c": "null", "b/0/d": 0.5, "e": "[]", "f/0": True, "f/1": "x", "g/h": "i"}
    assert flatten(nested) == flat


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_an_error_that_says_how_to_install_it(tiny_sd3_dir, tmp_path, monkeypatch, name):
    monkeypatch.setattr(am_diffusers.training.trackers, "get_available_trackers", lambda: ["tensorboard"])
    own = {"rewards": [{"name": "brightness"}], "eval_rewards": [{"name": "symmetry"}]}
    path = tiny_config(tiny_sd3_dir, tmp_path, **own)
    with pytest.raises(ValueError, match=rf'--report_to {name} .*pip install "am_diffusers\[{name}\]"'):
        make_plan(parse_config(["--config", str(path), "--report_to", name]), 1)
    make_plan(parse_config(["--config", str(path), "--report_to", "none"]), 1)
