"""A run that goes on with other settings: stored rows aim at what was trained before and are dropped."""

import logging
from dataclasses import replace

import pytest
from finetune_runs import read_metrics, tiny_config
from test_trainer_runs import make_run

from am_diffusers.build.resume import outdated, settings_of
from am_diffusers.command_line import parse_config
from am_diffusers.plan import make_plan
from am_diffusers.saver import SETTINGS
from am_diffusers.state_files import save_state

COMMON = {"rewards": [{"name": "brightness"}], "eval_prompts": None, "eval_rewards": None}
METHODS = {
    "buffered": {"method": "buffered_adjoint_matching", "buffer_size": 8, "buffer_refresh": 4},
    "grpo": {"method": "flow_grpo", "samples_per_prompt": 2, "grpo_passes": 4},
}


def go_on(tiny_sd3_dir, tmp_path, caplog, first, second):
    """Metrics of the iteration after a checkpoint that was made with other settings, and the warnings."""
    common = COMMON | {"validation_steps": 9, "allow_config_change": True}
    for changes in ({"max_train_steps": 2} | first, {"max_train_steps": 3} | second):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run = make_run(tiny_sd3_dir, tmp_path, tmp_path, **(common | changes))
            run.trainer.hooks = replace(run.trainer.hooks, validate=lambda iteration: {})
            run.trainer.train()
            assert run.lock is not None
            run.lock.release()
    return read_metrics(tmp_path / "out")[2], caplog.text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("buffered", {"reward_scale": 2.0}),
        pytest.param("buffered", {"num_inference_steps": 5}, marks=pytest.mark.slow),
        ("grpo", {"rewards": [{"name": "jpeg_size"}]}),
    ],
)
def test_rows_made_with_another_setting_are_dropped(tiny_sd3_dir, tmp_path, caplog, name, changes):
    metrics, warnings = go_on(tiny_sd3_dir, tmp_path, caplog, METHODS[name], METHODS[name] | changes)
    (setting,) = changes
    assert f"made with another {setting} and are dropped: the buffer starts empty" in warnings
    assert "reward" in metrics  # a new rollout
    assert metrics.get("buffer/samples", 4) == 4
    assert metrics.get("grpo_pass", 1) == 1


@pytest.mark.parametrize(
    ("setting", "value", "dropped"),
    [
        ("reward_scale", 2.0, True),
        ("pairing", "left", True),
        ("rewards", [{"name": "brightness", "weight": 2.0}], True),
        ("reward_clip_quantile", 0.9, True),
        ("guidance_mode", "none", True),
        ("learning_rate", 1e-4, False),
        ("buffer_refresh", 2, False),
        ("rank", 8, False),
    ],
)
def test_which_settings_outdate_stored_rows(tiny_sd3_dir, tmp_path, setting, value, dropped):
    def settings(**changes):
        path = tiny_config(tiny_sd3_dir, tmp_path, **(METHODS["buffered"] | COMMON | changes))
        return settings_of(make_plan(parse_config(["--config", str(path)]), 1))

    save_state(tmp_path, SETTINGS, settings())
    assert outdated(tmp_path, settings()) == []
    assert outdated(tmp_path, settings(**{setting: value})) == ([setting] if dropped else [])


@pytest.mark.parametrize("name", ["buffered", pytest.param("grpo", marks=pytest.mark.slow)])
def test_rows_are_kept_if_what_changed_has_no_part_in_them(tiny_sd3_dir, tmp_path, caplog, name):
    changes = METHODS[name] | {"learning_rate": 1e-4}
    metrics, warnings = go_on(tiny_sd3_dir, tmp_path, caplog, METHODS[name], changes)
    assert "dropped" not in warnings
    assert "reward" not in metrics
    assert metrics.get("grpo_pass", 3) == 3
