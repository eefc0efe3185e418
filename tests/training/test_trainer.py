"""The training loop with a one-vector method: gradients, randomness, logs, faults."""

import pytest
import torch
from test_processes import run_both

from am_diffusers.prompts.order import prompt_rows
from am_diffusers.training.metrics import MetricsLog
from am_diffusers.training.trainer import IterationError
from finetune_runs import read_metrics
from small_trainer import PROMPTS, make_trainer


def test_an_iteration_is_one_gradient_step_on_the_mean_over_rows(tmp_path):
    trainer, method, weight = make_trainer(tmp_path)
    for iteration, learning_rate in enumerate((0.1, 0.05)):
        before = weight.detach().clone()
        metrics = trainer.iterate()
        trainer.state.progress.iteration += 1
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
        whole.state.progress.iteration += 1
        split.state.progress.iteration += 1


def test_numbers_of_the_loss_are_summed_over_micro_batches(tmp_path):
    trainer, method, _ = make_trainer(tmp_path, loss_micro_batch_size=3)
    own = method.loss
    method.loss = lambda example: (own(example)[0], {"rows": float(len(example))})
    assert trainer.iterate()["rows"] == 8


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
    trainer, *_ = make_trainer(tmp_path, show=lambda iteration: shown.append(iteration) or {})
    trainer.train()
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(6))
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1 / (1 + i) for i in range(6)])
    assert shown == [0, 4, 6]


def test_the_bar_shows_the_last_known_numbers_and_the_log_those_of_its_iteration(tmp_path):
    bar = {"loss": "loss", "reward": "reward"}
    log = MetricsLog(tmp_path / "metrics.jsonl", total=2, bar=bar)
    log.write(0, {"loss": 1.0, "reward": 3.0})
    log.write(1, {"loss": 2.0})
    assert log._bar.postfix == "loss=2, reward=3"
    log.close()
    assert read_metrics(tmp_path)[1] == {"iteration": 1, "loss": 2.0}


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
        trainer.state.progress.iteration += 1
    before, method.broken = weight.detach().clone(), broken
    with pytest.raises(IterationError, match=message):
        trainer.train()
    assert torch.equal(weight, before)
    assert len(read_metrics(tmp_path)) == 2


def test_gradients_are_summed_over_processes_and_missing_ones_count_as_zero():
    def work(processes):
        parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
        parameters[0].grad = torch.ones(2, 3)
        if processes.is_main:
            parameters[1].grad = torch.ones(4)
        processes.sum_gradients(parameters)
        return [parameter.grad.tolist() for parameter in parameters]

    assert run_both(work) == [[[[2.0] * 3] * 2, [1.0] * 4]] * 2
