"""The training loop, for any method: prompts -> collect -> micro-batches -> clip -> optimizer step -> log.

Everything random is a function of (seed, iteration, sample id), so the number of processes and the sizes of
micro-batches don't change a run. Processes share the samples of an iteration; the loss of a method is a sum
over rows that is already divided by the rows of all processes, so gradients are summed over processes, not
averaged. A LoRA's gradients are a few megabytes: one all-reduce after the last backward pass does it, and
the passes in between need no wrapper that would synchronise them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from am_diffusers.adjoint import NonFiniteError
from am_diffusers.matching import MatchingBatch
from am_diffusers.methods import Method
from am_diffusers.methods.base import Collected
from am_diffusers.metrics import MetricsLog
from am_diffusers.prompts import prompt_rows
from am_diffusers.rollout import generator_for, generators_for
from am_diffusers.velocity import Conditioning


class IterationError(ValueError):
    """An iteration could not be finished; the message says which one and why."""


@dataclass(frozen=True)
class TrainOptions:
    """Sizes of a run.

    Attributes:
        seed: of all noise and of the order of the prompts.
        train_batch_size: samples an iteration, over all processes; a multiple of their number.
        max_train_steps: iterations.
        loss_micro_batch_size: rows a forward and backward pass.
        max_grad_norm: global gradient norm above which gradients are scaled down.
        validation_steps: iterations between two calls of `show`.
    """

    seed: int
    train_batch_size: int
    max_train_steps: int
    loss_micro_batch_size: int
    max_grad_norm: float
    validation_steps: int


@dataclass
class TrainState:
    """What an iteration changes, besides the method's own state.

    Attributes:
        parameters: trained parameters, the same on all processes.
        optimizer: over `parameters`.
        lr_schedule: stepped once an iteration.
        iteration: optimizer steps taken.
    """

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    iteration: int = 0


class Trainer:
    """Runs a method's iterations.

    Args:
        method: makes the training rows and their loss.
        state: parameters and optimizer.
        options: sizes of the run.
        prompts: training prompts.
        encode: B prompts to their conditioning.
        accelerator: processes and device.
        log: where metrics go.
        show: validates: called with the iteration before the first one, every `validation_steps` and at the
            end, on all processes; returns its metrics.
    """

    def __init__(
        self,
        method: Method,
        state: TrainState,
        options: TrainOptions,
        *,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], Conditioning],
        accelerator: Accelerator,
        log: MetricsLog,
        show: Callable[[int], dict[str, float]],
    ) -> None:
        self.method, self.state, self.options = method, state, options
        self.prompts, self.encode = prompts, encode
        self.accelerator, self.log, self.show = accelerator, log, show

    def train(self) -> None:
        """Run the remaining iterations.

        Raises:
            IterationError: as `iterate`.
        """
        last = self.options.max_train_steps
        self.show(self.state.iteration)
        while self.state.iteration < last:
            metrics = self.iterate()
            self.log.write(self.state.iteration, metrics)
            self.state.iteration += 1
            if self.state.iteration % self.options.validation_steps == 0 or self.state.iteration == last:
                self.show(self.state.iteration)
        self.log.close()

    def iterate(self) -> dict[str, float]:
        """One optimizer step; its metrics, the same on all processes.

        Raises:
            IterationError: a picture, reward, adjoint, loss or gradient is not finite; names the iteration
                and what it was computed from. Parameters are left as they were.
        """
        started = time.perf_counter()
        try:
            collected = self._collect()
            loss = self._backward(collected.examples)
            grad_norm = self._step()
        except ValueError as error:
            raise IterationError(f"iteration {self.state.iteration}: {error}") from error
        (learning_rate,) = set(self.state.lr_schedule.get_last_lr())
        self.state.lr_schedule.step()
        seconds = time.perf_counter() - started
        own = {"grad_norm": grad_norm, "learning_rate": learning_rate, "seconds": seconds}
        return {"loss": loss, **collected.metrics, **own}

    def _collect(self) -> Collected:
        """Training rows of this process's share of the iteration's samples."""
        seed, iteration, batch = self.options.seed, self.state.iteration, self.options.train_batch_size
        share = batch // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        samples = range(first, first + share)
        rows = prompt_rows(seed, iteration, batch, len(self.prompts))
        cond = self.encode([self.prompts[rows[sample]] for sample in samples])
        generators = generators_for(seed, iteration, samples)
        return self.method.collect(cond, generators, generator_for(seed, iteration, "shared"))

    def _backward(self, examples: MatchingBatch) -> float:
        """Gradients of this process's rows; the loss over all processes."""
        self.state.optimizer.zero_grad()
        total = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        for example in examples.split(self.options.loss_micro_batch_size):
            loss, _ = self.method.loss(example)
            if not loss.isfinite():
                raise NonFiniteError(f"loss is {loss.item()} for {_describe(example)}")
            loss.backward()
            total += loss.detach()
        return self.accelerator.reduce(total, "sum").item()  # pyright: ignore[reportAttributeAccessIssue]

    def _step(self) -> float:
        """Sum gradients over processes, clip, take the optimizer step; the norm before clipping."""
        parameters = self.state.parameters
        sum_gradients(self.accelerator, parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm).item()
        if not norm < float("inf"):
            raise NonFiniteError(
                f"gradient norm is {norm} though the loss is finite: lower learning_rate, or use float32 "
                "(mixed_precision no)"
            )
        self.state.optimizer.step()
        return norm


def sum_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace the gradients of `parameters` by their sums over the processes; a missing one counts as 0."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    summed: Tensor = accelerator.reduce(flat, "sum")  # pyright: ignore[reportAssignmentType]
    parts = summed.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _describe(example: MatchingBatch) -> str:
    """What a micro-batch was made of, for an error message."""
    norms = {
        name: [round(n, 3) for n in getattr(example, name).flatten(1).norm(dim=1).tolist()]
        for name in ("latents", "target")
    }
    sigmas = [round(sigma, 4) for sigma in example.sigmas.tolist()]
    prompts = [example.cond.prompts[i] for i in example.samples.tolist()]
    return (
        f"rows with sigmas {sigmas}, prompts {sorted(set(prompts))}, norms of latents {norms['latents']} "
        f"and targets {norms['target']}"
    )
