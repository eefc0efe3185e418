import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from finetune_runs import read_metrics, tiny_config, write_rewards
from safetensors.torch import load_file

from am_diffusers.build import METHOD_BUILDERS, build, make_accelerator, make_state
from am_diffusers.command_line import parse_config
from am_diffusers.config import OptimizerConfig
from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.methods import METHODS
from am_diffusers.methods.base import Collected, Method
from am_diffusers.metrics import MetricsLog
from am_diffusers.models.sd3 import SD3
from am_diffusers.plan import make_plan, network_calls
from am_diffusers.prompts import prompt_rows
from am_diffusers.trainer import IterationError, Trainer, TrainOptions, TrainState, sum_gradients
from am_diffusers.velocity import CallableField, Conditioning

PROMPTS = [f"prompt {i}" for i in range(5)]


class Regression(Method):
    """Rows with a random target; the policy is one trained vector. `broken` names what gets a NaN."""

    needs_reward_gradient = False

    def __init__(self, weight, broken=None):
        self.policy = CallableField(lambda x, sigma, cond: x * weight)
        self.broken, self.seen = broken, []

    def collect(self, cond, generators, shared):
        self.seen.append((cond.prompts, [g.initial_seed() for g in generators], shared.initial_seed()))
        latents = torch.stack([torch.randn(3, generator=g) for g in generators])
        target = latents.roll(1, 1)
        if self.broken == "target":
            target[0] = math.nan
        rows = torch.ones(len(cond)) / len(cond)
        batch = MatchingBatch(latents, rows * 2, target, rows, torch.arange(len(cond)), cond)
        return Collected(batch, rows, {"reward": 1.0, "masked": 0.0})

    def loss(self, example):
        loss = matching_loss(self.policy, example)
        if self.broken == "gradient":
            loss = loss + (self.policy(example.latents * 0, None, None)).abs().sqrt().sum()
        return loss, {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def make_trainer(tmp_path, *, broken=None, show=lambda iteration: None, **changes):
    weight = torch.nn.Parameter(torch.zeros(3))
    method = Regression(weight, broken)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1 / (1 + iteration))
    options = TrainOptions(
        seed=7,
        train_batch_size=8,
        max_train_steps=6,
        loss_micro_batch_size=8,
        max_grad_norm=1e9,
        validation_steps=4,
    )
    trainer = Trainer(
        method,
        TrainState([weight], optimizer, schedule),
        dataclasses.replace(options, **changes),
        prompts=PROMPTS,
        encode=lambda prompts: Conditioning(tuple(prompts)),
        accelerator=Accelerator(cpu=True),
        log=MetricsLog(tmp_path / "metrics.jsonl", total=6),
        show=show,
    )
    return trainer, method, weight


def test_an_iteration_is_one_gradient_step_on_the_mean_over_rows(tmp_path):
    trainer, method, weight = make_trainer(tmp_path)
    for iteration, learning_rate in enumerate((0.1, 0.05)):
        before = weight.detach().clone()
        metrics = trainer.iterate()
        trainer.state.iteration += 1
        noise = [torch.Generator().manual_seed(seed) for seed in method.seen[iteration][1]]
        latents = torch.stack([torch.randn(3, generator=g) for g in noise])
        errors = latents * before - latents.roll(1, 1)
        gradient = (2 * latents * errors).mean(0)
        torch.testing.assert_close(weight.detach(), before - learning_rate * gradient)
        assert metrics["loss"] == pytest.approx(errors.square().sum(1).mean().item())
        assert metrics["grad_norm"] == pytest.approx(gradient.norm().item())


@pytest.mark.parametrize("size", [1, 3, 5])
def test_micro_batches_do_not_change_the_losses(tmp_path, size):
    whole, *_ = make_trainer(tmp_path)
    split, *_ = make_trainer(tmp_path, loss_micro_batch_size=size)
    for _ in range(4):
        a, b = whole.iterate(), split.iterate()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        whole.state.iteration += 1
        split.state.iteration += 1


def test_prompts_and_noise_are_functions_of_seed_and_iteration(tmp_path):
    trainer, method, _ = make_trainer(tmp_path)
    trainer.train()
    assert [prompts for prompts, _, _ in method.seen] == [
        tuple(PROMPTS[row] for row in prompt_rows(7, iteration, 8, 5)) for iteration in range(6)
    ]
    seeds = [seed for _, own, shared in method.seen for seed in [*own, shared]]
    assert len(set(seeds)) == 6 * 9
    again, repeated, _ = make_trainer(tmp_path)
    again.train()
    assert repeated.seen == method.seen


def test_metrics_schedule_and_pictures_follow_the_iterations(tmp_path):
    shown = []
    trainer, *_ = make_trainer(tmp_path, show=shown.append)
    trainer.train()
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(6))
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1 / (1 + i) for i in range(6)])
    assert shown == [0, 4, 6]


def test_gradients_are_clipped_and_the_norm_before_is_logged(tmp_path):
    trainer, _, weight = make_trainer(tmp_path, max_grad_norm=0.01)
    assert trainer.iterate()["grad_norm"] > 0.01
    assert weight.detach().norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("target", r"iteration 2: loss is nan .*sigmas \[0.25.*prompts \['prompt .*norms of latents"),
        ("gradient", r"iteration 2: gradient norm is (nan|inf)"),
    ],
)
def test_not_finite_stops_before_the_parameters_change(tmp_path, broken, message):
    trainer, method, weight = make_trainer(tmp_path)
    for _ in range(2):
        trainer.log.write(trainer.state.iteration, trainer.iterate())
        trainer.state.iteration += 1
    before, method.broken = weight.detach().clone(), broken
    with pytest.raises(IterationError, match=message):
        trainer.train()
    assert torch.equal(weight, before)
    assert len(read_metrics(tmp_path)) == 2


def test_gradients_are_summed_over_processes_and_missing_ones_count_as_zero():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad = torch.ones(2, 3)
    two = SimpleNamespace(num_processes=2, reduce=lambda values, how: {"sum": values + 1}[how])
    sum_gradients(two, parameters)  # pyright: ignore[reportArgumentType]
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 2.0))
    assert parameters[1].grad is not None
    assert torch.equal(parameters[1].grad, torch.ones(4))


# From here on: the real method on a random Stable Diffusion 3 pipeline.


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
        run.trainer.state.iteration += 1
    return losses


@pytest.fixture(scope="module")
def reference_losses(tiny_sd3_dir, rewards_dir, tmp_path_factory):
    return run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize(
    "sizes",
    [
        {"loss_micro_batch_size": 1},
        {"loss_micro_batch_size": 5},
        {"rollout_micro_batch_size": 3, "reward_micro_batch_size": 1},
        {"gradient_checkpointing": True},
        {"free_text_encoders": False},
    ],
)
def test_settings_for_memory_do_not_change_a_run(
    tiny_sd3_dir, rewards_dir, tmp_path, reference_losses, sizes
):
    losses = run_losses(make_run(tiny_sd3_dir, rewards_dir, tmp_path, **sizes))
    assert losses == pytest.approx(reference_losses, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"transitions": "ancestral", "pairing": "trapezoid", "sigma_jitter": 0.3},
        {"adjoint": "full", "loss_steps": 2, "mask_quantile": None},
        {"rollout_guidance_scale": 2.0, "eval_guidance_scale": 2.0},
        {"rewards": [{"name": "brightness", "weight": 2.0}], "lora_layers": ["attn.to_q"]},
    ],
)
def test_every_kind_of_run_trains(tiny_sd3_dir, rewards_dir, tmp_path, changes, reference_losses):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, **changes)
    losses = run_losses(run, 2)
    run.trainer.show(2)
    assert losses != pytest.approx(reference_losses[:2], rel=1e-5)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_steps": 1}, {"adjoint": "full"}, {"rollout_guidance_scale": 2.0}],
)
def test_the_announced_network_calls_are_those_made(
    tiny_sd3_dir, rewards_dir, tmp_path, monkeypatch, changes
):
    changes = {"mask_quantile": None, "loss_micro_batch_size": 1, "train_batch_size": 1} | changes
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path, **changes)
    calls = []
    original = SD3.velocity
    monkeypatch.setattr(SD3, "velocity", lambda *args: calls.append(0) or original(*args))
    run.trainer.iterate()
    config = parse_config(["--config", str(tmp_path / "run.yaml")])
    announced = network_calls(config.method)
    first = announced.pop("base, forward if step 0 is trained")
    assert sum(announced.values()) <= len(calls) <= sum(announced.values()) + first


def test_execute_writes_what_it_announces(tiny_sd3_dir, rewards_dir, tmp_path):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path)
    evaluation = run.execute()
    out = tmp_path / "out"
    assert evaluation is not None
    assert {name: gain.role for name, gain in evaluation.rewards.items()} == {
        "pickscore": "trained",
        "hpsv2": "held-out",
    }
    assert (evaluation.num_prompts, evaluation.images_per_prompt) == (3, 2)
    assert evaluation.diversity is not None
    assert evaluation.diversity.features == "hpsv2"
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert max(value.abs().max() for key, value in weights.items() if "lora_B" in key) > 0
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        *(f"iteration-{i:06d}.png" for i in (0, 2, 4)),
        "pictures.json",
    ]
    assert len(read_metrics(out)) == 4
    assert parse_config(["--config", str(out / "config.yaml")]).optimizer.train_batch_size == 4


def test_a_new_run_removes_the_results_of_an_earlier_one(tiny_sd3_dir, rewards_dir, tmp_path):
    samples, logs = tmp_path / "out/samples", tmp_path / "out/logs/am_diffusers"
    samples.mkdir(parents=True)
    logs.mkdir(parents=True)
    own = [tmp_path / "out/evaluation.json", samples / "iteration-000900.png", logs / "events.out.tfevents.1"]
    others = [tmp_path / "out/notes.txt", samples / "mine.png", logs / "mine"]
    for path in [*own, *others]:
        path.write_text("earlier")
    make_run(tiny_sd3_dir, rewards_dir, tmp_path)
    assert [path.exists() for path in [*own, *others]] == [False] * 3 + [True] * 3


def test_a_reward_that_turns_nan_names_iteration_and_prompts(tiny_sd3_dir, rewards_dir, tmp_path):
    run = make_run(tiny_sd3_dir, rewards_dir, tmp_path)
    run.trainer.iterate()
    run.trainer.state.iteration = 1
    good = run.trainer.method.reward
    run.trainer.method.reward = lambda latents, prompts: good(latents, prompts) * math.nan
    with pytest.raises(IterationError, match=r"iteration 1: reward is NaN or infinite .*'"):
        run.trainer.iterate()


def test_every_method_has_a_builder_and_the_schedule_is_a_function_of_the_iteration():
    assert set(METHOD_BUILDERS) == set(METHODS)
    options = OptimizerConfig(learning_rate=1.0, lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=4)
    state = make_state(options, [torch.nn.Parameter(torch.zeros(1))])
    rates = []
    for _ in range(4):
        rates.extend(state.lr_schedule.get_last_lr())
        state.optimizer.step()
        state.lr_schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5])
