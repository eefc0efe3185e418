"""Runs of Efficient and of deterministic Adjoint Matching on a random Stable Diffusion 3 pipeline."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from test_trainer_runs import make_run

from am_diffusers.config.command_line import parse_config
from am_diffusers.estimate import describe
from am_diffusers.run.counting import count
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from finetune_runs import read_metrics, write_rewards

EFFICIENT = {"method": "efficient_adjoint_matching", "num_inference_steps": 20, "eam_ode_steps": 3}
DETERMINISTIC = {"method": "deterministic_adjoint_matching"}


@pytest.fixture(scope="module")
def rewards_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    write_rewards(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        EFFICIENT | {"eam_score": "renoised", "reward_clip_quantile": 0.5},
        DETERMINISTIC | {"mask_quantile": 0.6, "reward_clip_quantile": 0.5, "sigma_jitter": 0.3},
    ],
    ids=["efficient", "deterministic"],
)
def test_a_run_that_stops_goes_on_as_if_it_had_not(tiny_sd3_dir, rewards_dir, tmp_path, changes):
    """Equivalence: bit-identical LoRA and metrics, with thresholds of mask and clipping restored.

    The reward reads no prompts: text features depend, in the last bit, on the prompts encoded with them.
    """
    changes = changes | {"use_ema": True, "eval_prompts": None, "eval_rewards": None, "validation_steps": 9}
    changes |= {"rewards": [{"name": "brightness"}]}
    outputs = []
    for name, parts in (("whole", (3,)), ("parts", (2, 3))):
        folder = tmp_path / name
        folder.mkdir()
        for last in parts:
            run = make_run(
                tiny_sd3_dir, rewards_dir, folder, max_train_steps=last, allow_config_change=True, **changes
            )
            run.execute()
        outputs.append(folder / "out")
    whole, parts = (load_file(output / "pytorch_lora_weights.safetensors") for output in outputs)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    lines = [read_metrics(output) for output in outputs]
    for line in [*lines[0], *lines[1]]:
        line.pop("seconds")
    assert lines[0] == lines[1]
    assert max(value.abs().max() for key, value in whole.items() if "lora_B" in key) > 0


def test_settings_for_memory_do_not_change_a_run(tiny_sd3_dir, rewards_dir, tmp_path):
    sizes = {"rollout_micro_batch_size": 3, "loss_micro_batch_size": 5, "offload_trajectories": True}
    for name, method in (("efficient", EFFICIENT), ("deterministic", DETERMINISTIC)):
        losses = []
        for number, changes in enumerate(({}, sizes, {"rollout_micro_batch_size": "auto"})):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            run = make_run(tiny_sd3_dir, rewards_dir, folder, **method, **changes)
            losses.append(run.trainer.iterate()["loss"])
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_the_deterministic_method_says_what_it_is_not(tiny_sd3_dir, rewards_dir, tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING):
        make_run(tiny_sd3_dir, rewards_dir, tmp_path, **DETERMINISTIC)
    assert "does not sample base * exp(reward_scale * reward)" in caplog.text
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    assert "does NOT sample" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", [EFFICIENT, DETERMINISTIC])
def test_a_dry_run_counts_calls_and_estimates_memory(tiny_sd3_dir, rewards_dir, tmp_path, method):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, **method)
    assert run.lock is not None
    run.lock.release()
    config = parse_config(["--config", str(tmp_path / "run.yaml"), "--dry_run"])
    plan = make_plan(config, 1)
    rows = count(config).rows
    assert f"policy, forward and backward of the loss: {rows}" in plan.describe()
    assert "VAE and reward " in describe(plan, make_accelerator(config))


def test_flags_of_one_method_are_refused_by_the_others(tiny_sd3_dir, rewards_dir, tmp_path):
    for changes, flag in (
        (EFFICIENT | {"truncate_steps": 2}, "truncate_steps"),
        (EFFICIENT | {"loss_steps": 2}, "loss_steps"),
        (DETERMINISTIC | {"eam_c": 0.3}, "eam_c"),
        ({"cost_power": 3.0}, "cost_power"),
    ):
        with pytest.raises(ValueError, match=f"--{flag} is for"):
            make_run(tiny_sd3_dir, rewards_dir, tmp_path, **changes)
    for changes, match in (
        (DETERMINISTIC | {"truncate_steps": 5}, "truncate_steps must be from 1 to num_inference_steps"),
        (DETERMINISTIC | {"cost_power": 1.0}, "cost_power must be above 1"),
        (EFFICIENT | {"eam_sigma": 1.0}, r"eam_sigma must be in \(0, 1\)"),
        (EFFICIENT | {"eam_rows": 0}, "eam_rows must be from 1 to 1000"),
        (EFFICIENT | {"eam_ode_steps": 0}, "eam_ode_steps must be from 1 to 1000"),
        (EFFICIENT | {"eam_c": 0.0}, "eam_c must be positive"),
        (EFFICIENT | {"eam_max_weight": 0.0}, "eam_max_weight must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            make_run(tiny_sd3_dir, rewards_dir, tmp_path, **changes)
