"""The trainer with the real method on a random Stable Diffusion 3 pipeline."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from am_diffusers.config import OptimizerConfig
from am_diffusers.config.command_line import parse_config
from am_diffusers.divergences import Divergence
from am_diffusers.run.build import build
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from am_diffusers.run.training import make_state
from am_diffusers.training.trainer import IterationError
from finetune_runs import read_metrics, tiny_config, write_rewards

BUFFERED = {"method": "buffered_adjoint_matching", "buffer_size": 8, "buffer_refresh": 3}


@pytest.fixture(scope="module")
def rewards_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    write_rewards(folder)
    return folder


def make_run(model, rewards_dir, tmp_path, **changes):
    rewards = {
        "rewards": [{"name": "pickscore", "model": str(rewards_dir / "pickscore")}],
        "eval_rewards": [{"name": "hpsv2", "model": str(rewards_dir / "hpsv2")}],
        "report_to": "none",
    }
    config = parse_config(["--config", str(tiny_config(model, tmp_path, **(rewards | changes)))])
    accelerator = make_accelerator(config)
    return build(make_plan(config, accelerator.num_processes), accelerator)


def run_losses(run, iterations=3):
    losses = []
    for _ in range(iterations):
        losses.append(run.trainer.iterate()["loss"])
        run.trainer.state.progress.iteration += 1
    return losses


STABLE = {"adam_epsilon": 1e-3}
"""Without it Adam makes full steps, either way, of gradients that are nothing but rounding."""


@pytest.fixture(scope="module")
def reference_losses(tiny_sd3_dir, rewards_dir, tmp_path_factory):
    return run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path_factory.mktemp("reference"), **STABLE))


@pytest.mark.parametrize(
    "sizes",
    [
        {"loss_micro_batch_size": 1},
        {"loss_micro_batch_size": 5},
        {"rollout_micro_batch_size": 3, "reward_micro_batch_size": 1},
        {"gradient_checkpointing": True},
        {"free_text_encoders": False},
        {"offload_trajectories": True, "rollout_micro_batch_size": 2},
    ],
)
def test_settings_for_memory_do_not_change_a_run(
    tiny_sd3_dir, rewards_dir, tmp_path, reference_losses, sizes
):
    losses = run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path, **STABLE, **sizes))
    assert losses == pytest.approx(reference_losses, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16", "gradient_checkpointing": True},
        {"transitions": "ancestral", "pairing": "trapezoid", "sigma_jitter": 0.3},
        {"adjoint": "full", "loss_steps": 2, "mask_quantile": None},
        {"rollout_guidance_scale": 2.0, "eval_guidance_scale": 2.0},
        {"rollout_guidance_scale": 2.0, "guidance_mode": "everywhere", "adjoint": "full"},
        {"loss_steps": 2, "step_selection": "pps", "mask_quantile": None},
        {"rewards": [{"name": "brightness", "weight": 2.0}], "lora_layers": ["attn.to_q"]},
        {"divergence": "forward_kl", "reward_scale": 0.1},
        {"reward_smoothing_std": 0.1, "reward_smoothing_samples": 2},
    ],
)
def test_every_kind_of_run_trains(tiny_sd3_dir, rewards_dir, tmp_path, changes, reference_losses):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, **changes)
    losses = run_losses(run, 2)
    assert run.trainer.hooks.validate(2)["validation/hpsv2_gain"] != 0
    assert losses != pytest.approx(reference_losses[:2], rel=1e-5)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("storage", ["cpu", "disk"])
def test_a_buffered_run_trains_and_logs_rewards_where_it_rolls_out(
    tiny_sd3_dir, rewards_dir, tmp_path, storage
):
    changes = {**BUFFERED, "buffer_refresh": 2, "buffer_size": 8, "buffer_storage": storage}
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, max_train_steps=3, checkpointing_steps=2, **changes)
    run.execute()
    lines = read_metrics(tmp_path / "out")
    assert [("reward" in line, "reward/pickscore" in line) for line in lines] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    assert [line["buffer/age_max"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert (tmp_path / "out/samples/panel.png").exists()
    assert not list((tmp_path / "out").glob(".tensors-*"))
    (part,) = (tmp_path / "out/checkpoint-000003").glob("local-*.json")
    assert [len(g["prompts"]) for g in json.loads(part.read_text())["generations"]] == [4, 4]


def test_a_buffer_beyond_the_limit_is_refused_before_a_model_is_loaded(tiny_sd3_dir, rewards_dir, tmp_path):
    write_rewards(tmp_path)
    path = tiny_config(tiny_sd3_dir, tmp_path, **BUFFERED, buffer_max_gb=1e-6)
    with pytest.raises(
        ValueError, match=r"would hold 0.\d+ GiB .*--buffer_max_gb 1e-06: .*lower --buffer_size"
    ):
        make_plan(parse_config(["--config", str(path)]), 1)


def test_clipping_starts_after_the_first_iteration(tiny_sd3_dir, rewards_dir, tmp_path, reference_losses):
    losses = run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path, reward_clip_quantile=0.3), 2)
    assert losses[0] == pytest.approx(reference_losses[0], rel=1e-6)
    assert losses[1] != pytest.approx(reference_losses[1], rel=1e-3)


@pytest.mark.parametrize("max_prompts", [3, 2])
def test_a_divergence_is_normalised_on_base_pictures(tiny_sd3_dir, rewards_dir, tmp_path, max_prompts):
    changes = {"divergence": "pearson_chi2", "divergence_samples": 2, "divergence_prompts": max_prompts}
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, reward_scale=0.5, **changes)
    tilt = run.trainer.method.around.tilt
    saved = json.loads((tmp_path / "out/base_rewards.json").read_text())
    scores = torch.tensor(saved["scores"]["pickscore"], dtype=torch.float64)
    assert scores.shape == (max_prompts, 2)
    assert scores.std(dim=1).min() > 0
    assert len(set(saved["prompts"])) == max_prompts
    kind = Divergence("pearson_chi2")
    assert tilt.pooled == pytest.approx(kind.normaliser(scores.flatten(), 0.5))
    own = {p: kind.normaliser(s, 0.5) for p, s in zip(saved["prompts"], scores, strict=True)}
    assert tilt.by_prompt == (pytest.approx(own) if max_prompts == 3 else {})
    metrics = run.trainer.iterate()
    assert metrics["reward_slope"] != 1
    run.trainer.log.write(0, metrics)
    (logged,) = read_metrics(tmp_path / "out")
    assert logged["reward/pickscore"] == pytest.approx(metrics["reward"], rel=1e-5)


def test_validations_after_the_checkpoint_are_dropped(tiny_sd3_dir, rewards_dir, tmp_path):
    make_run(tiny_sd3_dir, rewards_dir, tmp_path, max_train_steps=2).execute()
    file = tmp_path / "out/validation.jsonl"
    done = file.read_text()
    file.write_text(done + '{"iteration": 4, "validation/pickscore": 1.0}\n')
    again = make_run(tiny_sd3_dir, rewards_dir, tmp_path, max_train_steps=2)
    again.lock.release()
    assert file.read_text() == done


def test_a_run_that_goes_on_reads_its_base_rewards_back(tiny_sd3_dir, rewards_dir, tmp_path, monkeypatch):
    changes = {"divergence": "forward_kl", "divergence_samples": 2, "reward_scale": 0.1}
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, max_train_steps=2, **changes)
    run.execute()
    monkeypatch.setattr("am_diffusers.run.base_scores.score_images", None)  # would be an error to call
    again = make_run(tiny_sd3_dir, rewards_dir, tmp_path, max_train_steps=2, **changes)
    assert again.trainer.method.around.tilt == run.trainer.method.around.tilt
    again.lock.release()
    (tmp_path / "out/base_rewards.json").write_text('{"prompts": ["other"], "scores": {}}')
    with pytest.raises(ValueError, match=r"base_rewards\.json is about other prompts"):
        make_run(tiny_sd3_dir, rewards_dir, tmp_path, max_train_steps=2, **changes)


def test_calibrated_rewards_are_logged_raw_and_scaled(tiny_sd3_dir, rewards_dir, tmp_path):
    model = str(rewards_dir / "pickscore")
    rewards = [
        {"name": "pickscore", "model": model, "weight": 2.0, "mean": 1.5, "std": 0.25},
        {"name": "brightness", "weight": -1.0},
    ]
    make_run(tiny_sd3_dir, rewards_dir, tmp_path, rewards=rewards, max_train_steps=2).trainer.train()
    for metrics in read_metrics(tmp_path / "out"):
        expected = 2 * (metrics["reward/pickscore"] - 1.5) / 0.25 - metrics["reward/brightness"]
        assert metrics["reward"] == pytest.approx(expected, rel=1e-4)


def test_rounded_rewards_are_another_training(tiny_sd3_dir, rewards_dir, tmp_path, reference_losses):
    rewards = [{"name": "pickscore", "model": str(rewards_dir / "pickscore"), "mode": "rounded"}]
    losses = run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path, rewards=rewards))
    assert losses == pytest.approx(reference_losses, rel=0.05)
    assert losses != pytest.approx(reference_losses, rel=1e-6)


def test_execute_writes_what_it_announces(tiny_sd3_dir, rewards_dir, tmp_path):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path)
    evaluation = run.execute()
    out = tmp_path / "out"
    assert evaluation is not None
    written = json.loads((out / "evaluation.json").read_text())
    roles = {name: gain["role"] for name, gain in written["rewards"].items()}
    assert roles == evaluation.roles == {"pickscore": "trained", "hpsv2": "held-out"}
    assert (evaluation.num_prompts, evaluation.images_per_prompt) == (3, 2)
    assert evaluation.diversity is not None
    assert evaluation.diversity.features == "hpsv2"
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert max(value.abs().max() for key, value in weights.items() if "lora_B" in key) > 0
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        *(f"iteration-{i:06d}.png" for i in (0, 2, 4)),
        "panel.png",
        "pictures.json",
    ]
    assert len(read_metrics(out)) == 4
    validations = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in validations] == [0, 2, 4]
    for name in ("pickscore", "hpsv2"):
        assert [line[f"validation/{name}_gain"] == 0 for line in validations] == [True, False, False]
        assert validations[0][f"validation/{name}"] == validations[0][f"validation/{name}_base"]
        # Few evaluation prompts: validation has them all, with the pictures of the evaluation.
        final, last = evaluation.rewards[name], validations[-1]
        assert last[f"validation/{name}"] == pytest.approx(final.tuned_mean, rel=1e-4)
        assert last[f"validation/{name}_gain"] == pytest.approx(final.gain.value, rel=1e-2)
    assert last["validation/diversity_kept"] == pytest.approx(evaluation.diversity.kept.value, rel=1e-2)
    assert parse_config(["--config", str(out / "config.yaml")]).optimizer.train_batch_size == 4


def test_a_new_run_removes_the_results_of_an_earlier_one(tiny_sd3_dir, rewards_dir, tmp_path):
    samples, logs = tmp_path / "out/samples", tmp_path / "out/logs/am_diffusers"
    samples.mkdir(parents=True)
    logs.mkdir(parents=True)
    own = [samples / "iteration-000900.png", logs / "events.out.tfevents.1"]
    own += [tmp_path / "out/validation.jsonl", samples / "panel.png"]
    others = [tmp_path / "out/notes.txt", samples / "mine.png", logs / "mine"]
    others.append(tmp_path / "out/evaluation.json")  # until the new LoRA stands
    for path in [*own, *others]:
        path.write_text("earlier")
    make_run(tiny_sd3_dir, rewards_dir, tmp_path, overwrite_output_dir=True)
    assert [path.exists() for path in [*own, *others]] == [False] * 4 + [True] * 4


def test_a_reward_that_turns_nan_names_iteration_and_prompts(tiny_sd3_dir, rewards_dir, tmp_path):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path)
    run.trainer.iterate()
    run.trainer.state.progress.iteration = 1
    good = run.trainer.method.terminal.reward
    run.trainer.method.terminal.reward = lambda latents, prompts: good(latents, prompts) * math.nan
    with pytest.raises(IterationError, match=r"iteration 1: reward is NaN or infinite .*'"):
        run.trainer.iterate()


def test_the_schedule_is_a_function_of_the_iteration():
    options = OptimizerConfig(learning_rate=1.0, lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=4)
    state = make_state(options, {"weight": torch.nn.Parameter(torch.zeros(1))})
    rates = []
    for _ in range(4):
        rates.extend(state.lr_schedule.get_last_lr())
        state.optimizer.step()
        state.lr_schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5])
