"""The monitor of adjoint norms: silent on sound runs, and says once what grows, where and why."""

import json
import logging
import math

import pytest
import torch

from am_diffusers.methods.parts.reports import AdjointMonitor
from am_diffusers.velocity import CallableField
from methods_around import adjoint_matching, collect, deterministic, efficient
from oracles import THREE_MODES
from small_trainer import make_trainer

SOUND = {1: 0.5, 2: 1.0, 3: 1.5, 4: 1.0}


def test_norms_that_stay_or_creep_say_nothing():
    monitor = AdjointMonitor()
    for iteration in range(300):
        factor = math.exp(0.02 * iteration) * (3 if iteration % 7 == 0 else 1)
        assert monitor.update({k: factor * norm for k, norm in SOUND.items()}) == []


def test_growth_along_the_trajectory_is_said_once_from_the_first_iteration_on():
    monitor = AdjointMonitor()
    (text,) = monitor.update({1: 25.0, 2: 12.0, 3: 2.0, 4: 1.0})
    assert "adjoint norm of step 1 is 25, 25 times that of the last step, 1;" in text
    assert "guidance in the adjoint, the full adjoint" in text
    assert monitor.update({1: 26.0, 2: 12.0, 3: 2.0, 4: 1.0}) == []


def test_growth_over_iterations_is_noticed_long_before_it_overflows():
    monitor, said = AdjointMonitor(), []
    for iteration in range(400):
        norms = {k: math.exp(0.1 * iteration) * norm for k, norm in SOUND.items()}
        said += [(iteration, norms[1], text) for text in monitor.update(norms)]
        monitor, state = AdjointMonitor(), json.loads(json.dumps(monitor.state_dict()))
        monitor.load_state_dict(state)
    ((iteration, norm, text),) = said
    assert iteration < 60
    assert norm < 1e3
    assert "times its running mean over earlier iterations; likely causes: a reward_scale" in text


def test_adjoint_matching_warns_where_its_base_expands_and_not_where_it_is_sound():
    sound = adjoint_matching()
    for iteration in range(5):
        assert collect(sound, iteration=iteration).warnings == []

    def expanding(x, sigma, cond):
        return THREE_MODES.velocity(x, sigma) - 25 * torch.tanh(x)

    method = adjoint_matching(base=CallableField(expanding), mask_quantile=None)
    (text,) = collect(method).warnings
    assert "times that of the last step" in text
    assert collect(method, iteration=1).warnings == []


def test_deterministic_adjoint_matching_warns_where_its_base_expands():
    """The ODE's adjoint, of all steps; a truncated one has less of a way to grow."""
    sound = deterministic(truncate_steps=None)
    for iteration in range(5):
        assert collect(sound, iteration=iteration).warnings == []
    base = CallableField(lambda x, sigma, cond: THREE_MODES.velocity(x, sigma) - 8 * torch.tanh(x))
    method = deterministic(base=base, truncate_steps=None)
    (text,) = collect(method).warnings
    assert "times that of the last step" in text
    resumed = deterministic(base=base, truncate_steps=None)
    resumed.load_state_dict(json.loads(json.dumps(method.state_dict())))
    for again in (method, resumed):
        assert collect(again, iteration=1).warnings == []


@pytest.mark.parametrize("score", ["renoised", "stopped"])
def test_efficient_adjoint_matching_warns_when_its_adjoint_grows_from_one_iteration_to_the_next(score):
    method = efficient(eam_score=score)
    for iteration in range(5):
        assert collect(method, iteration=iteration).warnings == []
    resumed = efficient(eam_score=score)
    resumed.load_state_dict(json.loads(json.dumps(method.state_dict())))
    for again in (method, resumed):
        plain = again.terminal.reward
        again.terminal.reward = lambda x, prompts, plain=plain: 30 * plain(x, prompts)
        (text,) = collect(again, iteration=5).warnings
        assert "adjoint norm of step 6 " in text
        assert "times its running mean over earlier iterations" in text
        assert collect(again, iteration=6).warnings == []


def test_the_trainer_names_the_iteration(tmp_path, caplog):
    trainer, method, _ = make_trainer(tmp_path)
    original = method.collect
    method.collect = lambda *args: object.__setattr__(c := original(*args), "warnings", ("grows",)) or c
    with caplog.at_level(logging.WARNING):
        trainer.iterate()
    assert "iteration 0: grows" in caplog.text
