"""Optimizers by name: they train, their states fit into a checkpoint, a missing package is named early."""

import importlib.util
import sys
import typing

import pytest
import torch

from am_diffusers.config import OptimizerConfig
from am_diffusers.config.command_line import parse_config
from am_diffusers.run.plan import make_plan
from am_diffusers.run.training import make_state
from am_diffusers.training.optimizers import OPTIMIZERS, check_optimizer
from am_diffusers.training.state_files import load_state, save_state
from finetune_runs import tiny_config, write_rewards

RATES = {"adamw": 0.05, "adamw8bit": 0.05, "prodigy": 1.0}


def make_problem(name, **changes):
    """A quadratic in a matrix and in a small vector that starts at zero, as a LoRA's B does."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "matrix": torch.nn.Parameter(torch.randn(96, 64, generator=generator)),
        "vector": torch.nn.Parameter(torch.zeros(5)),
    }
    goals = [torch.randn(p.shape, generator=generator) for p in parameters.values()]
    state = make_state(OptimizerConfig(optimizer=name, learning_rate=RATES[name], **changes), parameters)
    return state, goals


def steps(state, goals, number):
    losses = []
    for _ in range(number):
        loss = sum(
            (p - goal).square().mean() for p, goal in zip(state.parameters.values(), goals, strict=True)
        )
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.lr_schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name):
    losses = steps(*make_problem(name), 200)
    assert losses[-1] < 0.1 * losses[0]


def test_prodigy_finds_a_rate_from_a_millionth():
    state, goals = make_problem("prodigy", lr_scheduler="constant_with_warmup", lr_warmup_steps=3)
    steps(state, goals, 100)
    assert state.optimizer.param_groups[0]["d"] > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_exactly_from_the_files_of_its_state(name, tmp_path):
    state, goals = make_problem(name, adam_weight_decay=0.01)
    steps(state, goals, 5)
    save_state(tmp_path, "state", state.state_dict())
    resumed, _ = make_problem(name, adam_weight_decay=0.01)
    resumed.load_state_dict(load_state(tmp_path, "state"))
    assert steps(resumed, goals, 5) == steps(state, goals, 5)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("adamw8bit", "bitsandbytes", "8bit"), ("prodigy", "prodigyopt", "prodigy")],
)
def test_a_missing_package_is_named_in_the_plan(tmp_path, tiny_sd3_dir, monkeypatch, name, package, extra):
    write_rewards(tmp_path)
    path = tiny_config(tiny_sd3_dir, tmp_path, optimizer=name, learning_rate=1.0)
    config = parse_config(["--config", str(path)])
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(ValueError, match=rf'--optimizer {name} .* `pip install "am_diffusers\[{extra}\]"`'):
        make_plan(config, 1)


def test_a_learning_rate_of_adamw_is_warned_of_with_prodigy(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: True)
    for name, rate in (("prodigy", 1.0), ("adamw", 3e-4)):
        check_optimizer(name, rate)
    assert caplog.messages == []
    check_optimizer("prodigy", 3e-4)
    assert "use --learning_rate 1" in caplog.text


def test_the_config_offers_every_optimizer():
    assert typing.get_args(typing.get_type_hints(OptimizerConfig)["optimizer"]) == OPTIMIZERS
