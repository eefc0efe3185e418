"""A run that goes on with other settings: stored rows aim at what was trained before and are dropped."""

import logging
from dataclasses import replace

import pytest
from test_trainer_runs import make_run

from am_diffusers.config.command_line import parse_config
from am_diffusers.run.plan import make_plan
from am_diffusers.run.resume import outdated, settings_of
from am_diffusers.training.checkpoint import SETTINGS, Outdated
from am_diffusers.training.state_files import save_state
from finetune_runs import read_metrics, tiny_config

COMMON = {"rewards": [{"name": "brightness"}], "eval_prompts": None, "eval_rewards": None}
METHODS = {
    "buffered": {"method": "buffered_adjoint_matching", "buffer_size": 8, "buffer_refresh": 4},
    "grpo": {"method": "flow_grpo", "samples_per_prompt": 2, "grpo_passes": 4},
}


def go_on(tiny_sd3_dir, tmp_path, caplog, first, second, *, last=3):
    """Metrics of the iterations 3 .. last, after a checkpoint made with other settings, and the warnings."""
    common = COMMON | {"validation_steps": 9, "allow_config_change": True}
    for changes in ({"max_train_steps": 2} | first, {"max_train_steps": last} | second):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run = make_run(tiny_sd3_dir, tmp_path, tmp_path, **(common | changes))
            run.trainer.hooks = replace(run.trainer.hooks, validate=lambda iteration: {})
            run.trainer.train()
            assert run.lock is not None
            run.lock.release()
    return read_metrics(tmp_path / "out")[2:], caplog.text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("buffered", {"reward_scale": 2.0}),
        pytest.param("buffered", {"num_inference_steps": 5}, marks=pytest.mark.slow),
        ("grpo", {"rewards": [{"name": "jpeg_size"}]}),
    ],
)
def test_rows_made_with_another_setting_are_dropped(tiny_sd3_dir, tmp_path, caplog, name, changes):
    (metrics,), warnings = go_on(tiny_sd3_dir, tmp_path, caplog, METHODS[name], METHODS[name] | changes)
    (setting,) = changes
    assert f"made with another {setting} and are dropped: the buffer starts empty" in warnings
    assert "reward" in metrics  # a new rollout
    assert metrics.get("buffer/samples", 4) == 4
    assert metrics.get("grpo_pass", 1) == 1


@pytest.mark.parametrize(
    "changes",
    [{"train_batch_size": 8}, {"loss_steps": 2}, {"train_prompts": "others.txt"}],
    ids=lambda changes: "".join(changes),
)
def test_a_buffer_of_other_rows_is_filled_anew(tiny_sd3_dir, tmp_path, caplog, changes):
    """Beyond the next collection, which lays new rows beside those that are there."""
    ((setting, value),), buffered = changes.items(), METHODS["buffered"] | {"buffer_refresh": 2}
    if setting == "train_prompts":
        (tmp_path / value).write_text("a bright star\nthe dark wood\n")
        value = str(tmp_path / value)
    metrics, warnings = go_on(tiny_sd3_dir, tmp_path, caplog, buffered, buffered | {setting: value}, last=5)
    assert "and are dropped: the buffer starts empty" in warnings
    assert "start anew" not in warnings
    assert ["reward" in line for line in metrics] == [True, False, True]
    assert [line["buffer/samples"] for line in metrics] == ([8] * 3 if value == 8 else [4, 4, 8])


@pytest.mark.parametrize(
    "name",
    ["adjoint_matching", "deterministic_adjoint_matching", pytest.param("buffered", marks=pytest.mark.slow)],
)
def test_the_mask_of_another_goal_is_not_that_of_this_one(tiny_sd3_dir, tmp_path, caplog, name):
    """Targets 30 times as far are all beyond the thresholds of before: no row would be trained on."""
    method = METHODS.get(name, {"method": name}) | {"mask_quantile": 0.9}
    (metrics,), warnings = go_on(tiny_sd3_dir, tmp_path, caplog, method, method | {"reward_scale": 30.0})
    assert "are those of another reward_scale and start anew" in warnings
    assert "adjoint norm" not in warnings
    assert metrics["masked"] == 0.25  # the largest of four rows of each step


@pytest.mark.parametrize(
    ("setting", "value", "dropped", "anew"),
    [
        ("reward_scale", 2.0, True, True),
        ("pairing", "left", True, True),
        ("rewards", [{"name": "brightness", "weight": 2.0}], True, True),
        ("reward_clip_quantile", 0.9, True, True),
        ("guidance_mode", "none", True, True),
        ("mask_quantile", 0.5, True, True),
        ("tail_samples", 1, True, True),
        ("row_weights", "crossfit", True, True),
        ("train_batch_size", 8, True, False),
        ("loss_steps", 1, True, False),
        ("step_selection", "stratified", True, False),
        ("late_step_odds", 3.0, True, False),
        ("seed", 3, True, False),
        ("learning_rate", 1e-4, False, False),
        ("buffer_refresh", 2, False, False),
        ("buffer_size", 4, False, False),
        ("sigma_jitter", 0.2, False, False),
        ("rank", 8, False, False),
    ],
)
def test_which_settings_outdate_stored_rows_and_running_means(
    tiny_sd3_dir, tmp_path, setting, value, dropped, anew
):
    def settings(**changes):
        some = METHODS["buffered"] | COMMON | {"loss_steps": 2}
        path = tiny_config(tiny_sd3_dir, tmp_path, **(some | changes))
        return settings_of(make_plan(parse_config(["--config", str(path)]), 1))

    save_state(tmp_path, SETTINGS, settings())
    assert outdated(tmp_path, settings()) == Outdated(rows=[], means=[])
    found = outdated(tmp_path, settings(**{setting: value}))
    assert found == Outdated(rows=[setting] if dropped else [], means=[setting] if anew else [])


@pytest.mark.parametrize("name", ["buffered", pytest.param("grpo", marks=pytest.mark.slow)])
def test_rows_are_kept_if_what_changed_has_no_part_in_them(tiny_sd3_dir, tmp_path, caplog, name):
    changes = METHODS[name] | {"learning_rate": 1e-4}
    (metrics,), warnings = go_on(tiny_sd3_dir, tmp_path, caplog, METHODS[name], changes)
    assert "dropped" not in warnings
    assert "reward" not in metrics
    assert metrics.get("grpo_pass", 3) == 3


@pytest.mark.parametrize(("changes", "decides"), [({}, False), ({"row_weights": "ramp"}, True)])
def test_the_length_of_a_run_decides_where_weights_change_in_its_course(
    tiny_sd3_dir, tmp_path, changes, decides
):
    path = tiny_config(tiny_sd3_dir, tmp_path, **(COMMON | changes))
    settings = settings_of(make_plan(parse_config(["--config", str(path)]), 1))
    assert ("max_train_steps" in settings) == decides
