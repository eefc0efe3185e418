"""Where memory ran out and what to set: each phase of an iteration, from the outside."""

import dataclasses
import weakref

import pytest
import torch

from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.system.failures import PhaseMemoryError, is_out_of_memory, phase
from am_diffusers.training.trainer import IterationError
from methods_around import BASE, OFFSET, collect
from methods_around import adjoint_matching as make
from small_trainer import make_trainer

# As torch 2.14 words what CUDA's libraries say.
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
    MemoryError(),
]
OTHER = [
    RuntimeError("shape"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ValueError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_memory_that_runs_out_in_any_library_is_named_with_the_phase(error):
    message = "in the loss with 4 at once: set --loss"
    with pytest.raises(PhaseMemoryError, match=message) as caught, phase("loss", 4):
        raise error
    assert is_out_of_memory(error)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_pass_unchanged(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, phase("loss", 3):
        raise error
    assert caught.value is error


def test_tensors_of_a_failed_iteration_are_gone_when_it_is_saved(tmp_path):
    kept, alive = [], []
    trainer, method, _ = make_trainer(
        tmp_path, hooks={"save": lambda: alive.append([tensor() is not None for tensor in kept])}
    )
    good = method.loss

    def loss(example):
        activations = torch.zeros(3)
        if trainer.state.iteration:
            kept.append(weakref.ref(activations))
            exhausted(activations, ())
        return good(example)

    method.loss = loss
    with pytest.raises(IterationError, match="iteration 1: out of memory"):
        trainer.train()
    assert alive == [[False]]


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
