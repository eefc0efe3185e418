"""Gradients add up over processes: two processes with half of the samples each train as one with all."""

import dataclasses

import torch
from test_processes import run_both

from am_diffusers.methods.base import Collected
from small_trainer import make_trainer


def train(tmp_path, processes=None):
    """Train for six iterations; return the weights and the gradient norms that were logged."""
    trainer, _ = make_trainer(tmp_path)
    if processes is not None:
        trainer.processes = processes
        trainer.method.collect = _of_half_the_samples(trainer.method.collect)
    norms = []
    step = trainer.state.optimizer.step

    def watched(*args):
        norms.append(trainer.method.policy.function.__closure__[0].cell_contents.grad.clone())
        return step(*args)

    trainer.state.optimizer.step = watched
    trainer.train()
    return trainer.state.parameters["weight"].detach().clone(), norms


def _of_half_the_samples(collect):
    """Weigh the rows for a mean over the samples of both processes."""

    def halved(*args):
        collected = collect(*args)
        rows = dataclasses.replace(collected.examples, weight=collected.examples.weight / 2)
        return Collected(rows, collected.rewards, collected.metrics)

    return halved


def test_two_processes_have_the_gradients_of_one(tmp_path):
    alone, gradients = train(tmp_path / "alone")
    both = run_both(lambda processes: train(tmp_path / f"process{processes.index}", processes))
    assert len(gradients) == 6
    assert alone.norm() > 0.1
    for weights, found in both:
        torch.testing.assert_close(weights, alone, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-7)
