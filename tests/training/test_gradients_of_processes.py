"""Gradients add up over processes: two processes with half of the samples each train as one with all."""

import dataclasses

import torch
from test_processes import run_both

from am_diffusers.methods.base import Collected
from small_trainer import make_trainer


def train(folder, processes=None):
    """Train for six iterations; return the weights after each."""
    trainer, method, weight = make_trainer(folder)
    if processes is not None:
        trainer.processes = processes
        method.collect = of_half_the_samples(method.collect)
    found = []
    iterate = trainer.iterate

    def watched(*args):
        metrics = iterate(*args)
        found.append(weight.detach().clone())
        return metrics

    trainer.iterate = watched
    trainer.train()
    return torch.stack(found)


def of_half_the_samples(collect):
    """Weigh the rows for a mean over the samples of both processes."""

    def halved(*args):
        collected = collect(*args)
        rows = dataclasses.replace(collected.examples, weight=collected.examples.weight / 2)
        return Collected(rows, collected.rewards, collected.metrics)

    return halved


def test_two_processes_train_as_one(tmp_path):
    alone = train(tmp_path / "alone")
    assert alone.shape[0] == 6
    assert alone[-1].norm() > 0.1
    for weights in run_both(lambda processes: train(tmp_path / f"{processes.index}", processes)):
        torch.testing.assert_close(weights, alone, rtol=1e-5, atol=1e-7)
