"""Settings that are allowed and seldom wise: the dry run and the start of a run say so."""

import logging

import pytest
from test_trainer_runs import make_run, rewards_dir  # noqa: F401 - the fixture

from am_diffusers.config.checks import cautions
from am_diffusers.config.command_line import parse_config
from am_diffusers.run.plan import make_plan
from finetune_runs import tiny_config

BLACK_BOX = {"rewards": [{"name": "jpeg_size"}], "eval_prompts": None, "eval_rewards": None}


@pytest.mark.parametrize("method", ["flow_grpo", "ram"])
@pytest.mark.parametrize(
    ("advantages", "group", "cautious"),
    [("normalised", 2, True), ("normalised", 8, False), ("normalised", 7, True), ("centred", 2, False)],
)
def test_normalised_advantages_of_few_samples_are_cautioned_against(
    tiny_sd3_dir, tmp_path, method, advantages, group, cautious
):
    changes = {"advantages": advantages, "samples_per_prompt": group, "train_batch_size": group}
    path = tiny_config(tiny_sd3_dir, tmp_path, method=method, **BLACK_BOX, **changes)
    text = make_plan(parse_config(["--config", str(path)]), 1).describe()
    assert ("# caution: --advantages normalised" in text) == cautious
    if cautious:
        assert f"samples_per_prompt = {group} rewards" in text
        assert ("every advantage is +-reward_scale" in text) == (group == 2)


def test_a_run_begins_with_its_cautions(tiny_sd3_dir, rewards_dir, tmp_path, caplog):  # noqa: F811
    changes = {"method": "flow_grpo", "samples_per_prompt": 2, "advantages": "normalised"}
    with caplog.at_level(logging.WARNING):
        make_run(tiny_sd3_dir, rewards_dir, tmp_path, **BLACK_BOX, **changes)
    assert "set --samples_per_prompt 8 or more" in caplog.text


def test_ordinary_settings_need_no_caution(tiny_sd3_dir, tmp_path):
    assert cautions(parse_config(["--config", str(tiny_config(tiny_sd3_dir, tmp_path))])) == []
