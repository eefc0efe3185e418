"""Where memory ran out and what to set: each phase of an iteration, from the outside."""

import dataclasses

import pytest
import torch

from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.system.failures import PhaseMemoryError, phase
from am_diffusers.training.trainer import IterationError
from methods_around import BASE, OFFSET, collect
from methods_around import adjoint_matching as make
from small_trainer import make_trainer


class Exhausted(torch.autograd.Function):
    """Identity whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")


@dataclasses.dataclass
class Field:
    """A field that runs out of memory in calls or in vjps."""

    call: bool = False
    vjp_too: bool = False

    def __call__(self, x, sigma, cond):
        if self.call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return OFFSET(x, sigma, cond)

    def vjp(self, x, sigma, cond):
        if self.vjp_too:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return BASE.vjp(x, sigma, cond)


def exhausted(x, prompts):
    raise torch.OutOfMemoryError("CUDA out of memory")


def with_reward(reward, **changes):
    method = make(**changes)
    method.terminal.reward = reward
    return method


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: make(Field(call=True)), r"in the rollout with 6 at once: set --rollout_micro_batch_size 3"),
        (
            lambda: make(base=Field(vjp_too=True), sizes=Sizes(rollout=4)),
            r"in the adjoint sweep with 4 at once: set --rollout_micro_batch_size 2",
        ),
        (
            lambda: with_reward(exhausted),
            r"in decoding and rewards with 6 at once: set --reward_micro_batch_size 3",
        ),
        (
            lambda: with_reward(lambda x, prompts: Exhausted.apply(x).sum(1), sizes=Sizes(rollout=1)),
            r"in decoding and rewards with 1 at once: lower --rollout_micro_batch_size.*checkpointing",
        ),
        (
            lambda: make(Field(call=True), sizes=Sizes(rollout=1)),
            r"in the rollout with 1 at once: --gradient_checkpointing true, .*bf16 .*resolution",
        ),
    ],
)
def test_collecting_names_the_phase_the_setting_and_half_its_value(method, message):
    with pytest.raises(PhaseMemoryError, match=message):
        collect(method())


@pytest.mark.parametrize("backward", [False, True])
def test_the_loss_is_named_with_the_iteration(tmp_path, backward):
    trainer, method, weight = make_trainer(tmp_path, loss_micro_batch_size=5)
    trainer.iterate()
    trainer.state.progress.iteration += 1
    before = weight.detach().clone()
    good = method.loss

    def loss(example):
        value, metrics = good(example)
        return (Exhausted.apply(value) if backward else exhausted(value, ())), metrics

    method.loss = loss
    with pytest.raises(
        IterationError, match=r"iteration 1: out of memory in the loss with 5 at once.*size 2,"
    ):
        trainer.iterate()
    assert torch.equal(weight, before)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shape"), phase("loss", 3):
        raise RuntimeError("shape")
