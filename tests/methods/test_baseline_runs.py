"""RAM, DRaFT, ReFL and Flow-GRPO on a random Stable Diffusion 3: gradients, runs, resume, refusals."""

import math
import runpy
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from test_trainer_runs import make_run, rewards_dir, run_losses  # noqa: F401 - the fixture

from am_diffusers.config.command_line import parse_config
from am_diffusers.methods import METHODS
from am_diffusers.methods.draft import DRaFT, DRaFTSettings
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.methods.parts.surroundings import Surroundings
from am_diffusers.models.base import Model
from am_diffusers.noise import LatentSpec, generator_for, generators_for
from am_diffusers.run.plan import make_plan
from am_diffusers.transitions import uniform_sigmas
from families import PROMPTS, strong_lora
from finetune_runs import FINETUNE, read_metrics, tiny_config

JPEG = [{"name": "jpeg_size", "weight": 0.01}]
OWN = {
    "ram": {"method": "ram", "samples_per_prompt": 2},
    "draft": {"method": "draft", "draft_steps": 2},
    "refl": {"method": "refl", "refl_last_steps": 3},
    "flow_grpo": {"method": "flow_grpo", "samples_per_prompt": 2, "grpo_passes": 2},
}


# ------------------------------------------------------------------------------- DRaFT through the model


def tail_loss(model: Model) -> Callable[[], torch.Tensor]:
    """Loss of mean brightness through the last 2 of 3 stochastic steps, from states collected once."""
    around = Surroundings(
        model.policy,
        model.base,
        lambda latents, prompts: model.decode(latents).mean((1, 2, 3)),
        LatentSpec(model.latent_shape(64, 64), dtype=torch.float64),
        lambda steps, noisy: uniform_sigmas(steps),
    )
    shared = SharedSettings(num_inference_steps=3, reward_scale=100.0)
    own = DRaFTSettings(rollout_sampler="memoryless_local_linear", draft_steps=2)
    method = DRaFT(around, shared, own)
    cond = model.encode_prompts(PROMPTS, max_sequence_length=8)
    examples = method.collect(cond, generators_for(0, 0, range(2)), generator_for(0, "shared")).examples
    return lambda: method.loss(examples)[0]


@pytest.fixture
def exact(model: Model) -> Model:
    """The model with a strong LoRA, in float64."""
    strong_lora(model)
    model.network.double()
    model.vae.double()
    model.weight_dtype = torch.float64
    return model


def test_draft_reaches_the_lora_through_transformer_vae_and_steps(exact: Model) -> None:
    """Against a central difference along a random direction of all LoRA weights; norms inside are float32."""
    loss, parameters = tail_loss(exact), list(exact.lora_parameters().values())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters)
    expected = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    values, step = [], 1e-3
    for move in (step, -2 * step):
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data += move * d
        values.append(loss().item())
    assert abs(expected) > 1e-3
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=2e-3)


def test_gradient_checkpointing_changes_no_gradient_of_draft(exact: Model) -> None:
    loss, parameters = tail_loss(exact), list(exact.lora_parameters().values())
    plain = torch.autograd.grad(loss(), parameters)
    exact.enable_gradient_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(loss(), parameters), plain, rtol=1e-10, atol=1e-12)
    assert max(gradient.abs().max() for gradient in plain) > 1e-3


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("ram", {}, marks=pytest.mark.slow),
        ("ram", {"rewards": JPEG, "advantages": "normalised", "rollout_sampler": "ancestral"}),
        ("draft", {"gradient_checkpointing": True, "mixed_precision": "bf16"}),
        pytest.param(
            "draft",
            {"rollout_sampler": "memoryless_local_linear", "rollout_guidance_scale": 2.0},
            marks=pytest.mark.slow,
        ),
        ("refl", {}),
        pytest.param("flow_grpo", {"sigma_jitter": 0.3}, marks=pytest.mark.slow),
        ("flow_grpo", {"rewards": JPEG, "loss_steps": 2, "rollout_guidance_scale": 2.0}),
    ],
)
def test_every_kind_of_run_trains(tiny_sd3_dir, rewards_dir, tmp_path, name, changes):  # noqa: F811
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, **(OWN[name] | changes))
    before = [p.detach().clone() for p in run.trainer.state.parameters.values()]
    for iteration in range(2):
        metrics = run.trainer.iterate()
        run.trainer.state.progress.iteration += 1
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["grad_norm"] > 0
        rolled_out = name != "flow_grpo" or iteration == 0
        assert any(key.startswith("reward") for key in metrics) == rolled_out
    after = run.trainer.state.parameters.values()
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert run.trainer.hooks.validate(2)["validation/hpsv2_gain"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_memory_settings_change_no_run(tiny_sd3_dir, rewards_dir, tmp_path, name):  # noqa: F811
    sizes = {"rollout_micro_batch_size": 3, "reward_micro_batch_size": 1, "loss_micro_batch_size": 3}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path / "a", **OWN[name]))
    parts = run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path / "b", **(OWN[name] | sizes)))
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["draft", "flow_grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ram", "refl"))]
)
def test_a_run_of_the_script_goes_on_as_if_it_had_not_stopped(tiny_sd3_dir, tmp_path, monkeypatch, name):
    """4 iterations at once, and 3 and 1: the same LoRA and the same log, bit by bit.

    After 3 the rows of Flow-GRPO have a pass left and are in the checkpoint; only iterations with a rollout
    log rewards.
    """
    changes = OWN[name] | {"rewards": [{"name": "brightness"}], "eval_prompts": None, "eval_rewards": None}
    config, found = tiny_config(tiny_sd3_dir, tmp_path, report_to="none", **changes), []
    for folder, lengths in (("whole", [4]), ("stopped", [3, 4])):
        for length in lengths:
            flags = ["--output_dir", tmp_path / folder, "--max_train_steps", length]
            monkeypatch.setattr(sys, "argv", [str(FINETUNE), "--config", str(config), *map(str, flags)])
            runpy.run_path(str(FINETUNE), run_name="__main__")
        for line in (lines := read_metrics(tmp_path / folder)):
            line.pop("seconds")
        found.append((load_file(tmp_path / folder / "pytorch_lora_weights.safetensors"), lines))
    kept = list((tmp_path / "stopped/checkpoint-000003").glob("local-*"))
    assert bool(kept) == (name == "flow_grpo")
    (whole, lines), (stopped, other_lines) = found
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert lines == other_lines
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    rewards = [{key for key in line if key.startswith("reward")} for line in lines]
    assert [bool(keys) for keys in rewards] == [True, name != "flow_grpo"] * 2
    assert "reward" in rewards[0]
    assert (tmp_path / "stopped/samples/panel.png").exists()


@pytest.mark.parametrize(("name", "changes"), [("draft", {}), ("flow_grpo", {"advantages": "normalised"})])
def test_gradients_survive_half_precision(tiny_sd3_dir, rewards_dir, tmp_path, name, changes):  # noqa: F811
    """Iterations in float16 and float32: a loss whose terms cancel would be scaled out of range."""
    found = []
    for precision in ("no", "fp16"):
        (tmp_path / precision).mkdir()
        changes = OWN[name] | changes | {"mixed_precision": precision}
        run = make_run(tiny_sd3_dir, rewards_dir, tmp_path / precision, **changes)
        run.trainer._backward(run.trainer._collect().examples)
        gradients = [p.grad for p in run.trainer.state.parameters.values() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert found[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99
    assert found[1].norm().item() == pytest.approx(found[0].norm().item(), rel=0.05)


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_do_is_refused_before_anything_is_loaded(
    tiny_sd3_dir,
    rewards_dir,  # noqa: F811
    tmp_path,
    monkeypatch,
    name,
):
    monkeypatch.setattr("am_diffusers.models.pretrained.Pretrained.load", None)  # would be an error to call

    def plan(**changes):
        values = {"rewards": [{"name": "brightness"}], "eval_rewards": [], "eval_prompts": None}
        values |= {"samples_per_prompt": 2, "num_inference_steps": 20, "method": name}
        path = tiny_config(tiny_sd3_dir, tmp_path, **(values | changes))
        return make_plan(parse_config(["--config", str(path)]), 1)

    official = [{"name": "pickscore", "model": str(rewards_dir / "pickscore"), "mode": "official"}]
    if METHODS[name].needs_reward_gradient:
        with pytest.raises(
            ValueError, match=f"jpeg_size is not differentiable and {name} needs its gradient"
        ):
            plan(rewards=JPEG)
        with pytest.raises(ValueError, match=f"pickscore in mode official is not .* and {name} needs its"):
            plan(rewards=official)
    else:
        assert plan(rewards=JPEG).config.method.rewards[0].name == "jpeg_size"
        assert plan(rewards=official).config.method.rewards[0].mode == "official"
    if METHODS[name].compares_samples:
        with pytest.raises(
            ValueError, match=f"{name} compares samples of a prompt: set --samples_per_prompt"
        ):
            plan(samples_per_prompt=1)
    else:
        plan(samples_per_prompt=1)
    if name in OWN:
        for changes, flag in [
            ({"reward_smoothing_std": 0.1}, "reward_smoothing_std"),
            ({"divergence": "js"}, "divergence"),
            ({"mask_quantile": 0.5}, "mask_quantile"),
            ({"offload_trajectories": True}, "offload_trajectories"),
            ({"draft_steps": 2, "method": "ram"}, "draft_steps"),
        ]:
            with pytest.raises(ValueError, match=f"--{flag} is for .*leave it out"):
                plan(**changes)
        with pytest.raises(
            ValueError,
            match=f"--loss_micro_batch_size must be a number: auto does not know the passes of {name}",
        ):
            plan(loss_micro_batch_size="auto")


def test_a_reward_in_mode_official_is_scored_as_published(tiny_sd3_dir, rewards_dir, tmp_path):  # noqa: F811
    rewards = [{"name": "pickscore", "model": str(rewards_dir / "pickscore")}]
    found = []
    for mode in ("differentiable", "official"):
        (tmp_path / mode).mkdir()
        run = make_run(
            tiny_sd3_dir, rewards_dir, tmp_path / mode, **OWN["ram"], rewards=[{**rewards[0], "mode": mode}]
        )
        found.append(run.trainer.iterate()["reward"])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.1)
