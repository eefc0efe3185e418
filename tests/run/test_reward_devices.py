"""The device of a reward: another card of one process; refused before a model is loaded where it can't be."""

from pathlib import Path

import pytest
import torch

from am_diffusers.config.command_line import parse_config
from am_diffusers.run.plan import make_plan

CONFIG = Path(__file__).parents[2] / "configs/tiny_sd3.yaml"
TWO = "would hold the reward of all 2 processes, .*: leave device out, and each scores on its own card"


def plan(device, processes, *flags, flag="rewards", name="pickscore"):
    rewards = f"[{{name: {name}, model: 'asset:tiny_{name}', device: '{device}'}}]"
    return make_plan(parse_config(["--config", str(CONFIG), f"--{flag}", rewards, *flags]), processes)


@pytest.mark.parametrize(("flag", "name"), [("rewards", "pickscore"), ("eval_rewards", "hpsv2")])
@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cuda:1", 2, f"device cuda:1 {TWO}"),
        ("cuda:0", 2, f"device cuda:0 {TWO}"),
        ("cuda:2", 1, "there is no device cuda:2: this machine shows 2 cards"),
        ("gpu1", 1, "device must be null, cpu or a card such as cuda:1, got 'gpu1'"),
    ],
)
def test_a_device_that_cannot_be_is_refused(monkeypatch, tmp_path, flag, name, device, processes, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"rewards: {name}: .*{message}"):
        plan(device, processes, "--output_dir", str(tmp_path / "out"), flag=flag, name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "processes"), [("cuda:1", 1), ("cuda", 2), ("cpu", 2)])
def test_another_card_of_one_process_or_a_kind_of_device_may_be_named(
    monkeypatch, tmp_path, device, processes
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = plan(device, processes, "--output_dir", str(tmp_path / "out"))
    assert made.config.method.rewards[0].device == device


def test_a_dry_run_may_be_for_another_machine():
    assert plan("cuda:1", 1, "--dry_run").num_processes == 1
