"""Announced transformer calls that depend on which steps an iteration draws."""

import pytest
import torch
from am_diffusers.run.network_calls import FIRST, network_calls

from am_diffusers.config.command_line import parse_config
from am_diffusers.methods.parts.step_selection import StepSelection
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from finetune_runs import tiny_config

DRAWS = 2000
NUMBERS = [1, 2, 5, 6, 7, "all"]


def calls_at_first(folder, **changes):
    config = {"num_inference_steps": 8} | changes
    return network_calls(parse_config(["--config", str(tiny_config(folder, folder, **config))]))[FIRST]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ["last_and_random", "stratified", "pps"])
def test_the_base_call_at_step_0_counts_as_often_as_the_step_is_drawn(tmp_path, kind, number):
    """Of 7 steps with noise; within 4 standard errors over 2000 draws, pps before it saw a residual."""
    kind = "last_and_random" if number == "all" else kind
    generator, selection = torch.Generator().manual_seed(0), StepSelection(number, kind)
    table = memoryless_local_linear(uniform_sigmas(8))
    drawn = sum(0 in selection.select(table, generator).steps for _ in range(DRAWS)) / DRAWS
    chance = calls_at_first(tmp_path, loss_steps=number, step_selection=kind)
    assert 0 < chance <= 1
    assert drawn == pytest.approx(chance, abs=4 * (chance * (1 - chance) / DRAWS) ** 0.5)
    buffered = {"method": "buffered_adjoint_matching", "buffer_size": 8, "buffer_refresh": 4}
    share = calls_at_first(tmp_path, loss_steps=number, step_selection=kind, **buffered)
    assert share == pytest.approx(chance / 4, rel=1e-12)


def test_a_guided_base_call_at_step_0_counts_twice(tmp_path):
    guided = {"rollout_guidance_scale": 2.0, "guidance_mode": "everywhere"}
    assert calls_at_first(tmp_path, loss_steps=2, **guided) == pytest.approx(2 / 6, rel=1e-12)
