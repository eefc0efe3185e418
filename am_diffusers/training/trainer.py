"""The training loop, for any method: prompts -> collect -> micro-batches -> clip -> optimizer step -> log.

Everything random is a function of (seed, iteration, sample id), so the number of processes and the sizes of
micro-batches don't change a run. Processes share the samples of an iteration; a loss is a sum over rows that
is already divided by the rows of all processes: gradients are summed, by one all-reduce after the last pass.

An iteration happens as a whole or not at all, so a checkpoint can be written whatever ends it.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from am_diffusers.methods import Method
from am_diffusers.methods.base import Collected, Examples
from am_diffusers.noise import generator_for, generators_for
from am_diffusers.prompts.order import prompt_rows
from am_diffusers.system.failures import NonFiniteError, let_go, phase
from am_diffusers.system.half_precision import ScaledBackward
from am_diffusers.system.processes import Processes, share
from am_diffusers.training.checkpoint_folder import CheckpointError
from am_diffusers.training.metrics import MetricsLog, add_to
from am_diffusers.training.state import TrainState
from am_diffusers.velocity import Conditioning

logger = logging.getLogger(__name__)


class IterationError(ValueError):
    """An iteration could not be finished; the message says which one and why."""


@dataclass(frozen=True)
class TrainOptions:
    """Sizes of a run.

    Attributes:
        seed: seed of all noise and of the order of the prompts.
        train_batch_size: samples an iteration, over all processes; a multiple of their number.
        max_train_steps: iterations.
        loss_micro_batch_size: rows a forward and backward pass.
        max_grad_norm: global gradient norm above which gradients are scaled down.
        validation_steps: iterations between two calls of `validate`.
        samples_per_prompt: neighbouring samples of an iteration that share a prompt.
        checkpointing_steps: iterations between two checkpoints; None = at the end and when stopped.
        max_skipped_iterations: iterations in a row that are skipped because something isn't finite.
        early_stopping_patience: validations in a row without a new best score that end a run; None = all.
        early_stopping_metric: the score, a metric of validations.
    """

    seed: int
    train_batch_size: int
    max_train_steps: int
    loss_micro_batch_size: int
    max_grad_norm: float
    validation_steps: int
    samples_per_prompt: int = 1
    checkpointing_steps: int | None = None
    max_skipped_iterations: int = 0
    early_stopping_patience: int | None = None
    early_stopping_metric: str = ""


@dataclass(frozen=True)
class Hooks:
    """Functions that a run calls around its iterations.

    Attributes:
        encode: B prompts to their conditioning.
        validate: shows the model after a number of iterations, before the first one, every `validation_steps`
            and at the end; returns its metrics, the same on all processes.
        save: writes a checkpoint; called on all processes.
        more: further metrics of an iteration, called on all processes before its optimizer step.
        forget: drops what an unfinished iteration left in the rewards' records.
    """

    encode: Callable[[Sequence[str]], Conditioning]
    validate: Callable[[int], Mapping[str, float]] = lambda iteration: {}
    save: Callable[[], None] = lambda: None
    more: Callable[[], Mapping[str, float]] = dict
    forget: Callable[[], object] = lambda: None


class Trainer:
    """Runs a method's iterations.

    Args:
        method: makes the training rows and their loss.
        state: parameters and optimizer.
        options: sizes of the run.
        prompts: training prompts.
        hooks: encoding, validation, checkpoints.
        processes: who shares the work.
        log: where metrics go.
    """

    def __init__(
        self,
        method: Method,
        state: TrainState,
        options: TrainOptions,
        *,
        prompts: Sequence[str],
        hooks: Hooks,
        processes: Processes,
        log: MetricsLog,
    ) -> None:
        self.method, self.state, self.options = method, state, options
        self.prompts, self.hooks, self.processes, self.log = prompts, hooks, processes, log
        self._saved = state.iteration

    def train(self) -> None:
        """Run the remaining iterations. However it ends, the last finished iteration is saved.

        Raises:
            Interrupted: a signal came.
            IterationError: as `iterate`.
            CheckpointError: a checkpoint could not be written.
        """
        try:
            while not self._between():
                iteration, metrics = self.state.iteration, self.iterate()
                self.state.progress.iteration += 1
                self.processes.on_main(partial(self.log.write, iteration, metrics))
        except CheckpointError:
            raise
        except Exception as error:
            let_go(error)  # saving needs memory too
            self._save()
            raise
        finally:
            self.log.close()

    def iterate(self) -> dict[str, float]:
        """Take one optimizer step; return its metrics, the same on all processes.

        Raises:
            Interrupted: a signal came to one of the processes.
            IterationError: something is not finite and no more iterations may be skipped, or there is another
                error; names the iteration and the cause. Parameters and method are left as they were.
        """
        started, roll_back = time.perf_counter(), self.method.snapshot()
        progress = self.state.progress
        (learning_rate,) = set(self.state.lr_schedule.get_last_lr())
        metrics: dict[str, float] = {}
        try:
            with self.processes.together():
                collected = self._collect()
                metrics = {**self._backward(collected.examples), **collected.metrics}
                metrics["grad_norm"] = self._gradient_norm()
                metrics |= self.hooks.more()
        except Exception as error:
            roll_back(error)
            self.hooks.forget()
            if not isinstance(error, ValueError):
                raise
            if not isinstance(error, NonFiniteError) or not self._may_skip():
                raise IterationError(f"iteration {self.state.iteration}: {error}") from error
            logger.warning("iteration %d is skipped: %s", self.state.iteration, error)
            metrics = {"skipped": float(progress.skipped)}
        else:
            self.state.step()
            progress.skipped_in_a_row = 0
        self.state.lr_schedule.step()
        return metrics | {"learning_rate": learning_rate, "seconds": time.perf_counter() - started}

    def _may_skip(self) -> bool:
        """Count an iteration that isn't finite; whether the run may continue."""
        progress = self.state.progress
        if progress.skipped_in_a_row >= self.options.max_skipped_iterations:
            return False
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        return True

    def _between(self) -> bool:
        """Validate and save if due; whether the run is over."""
        progress, options = self.state.progress, self.options
        last = progress.iteration >= options.max_train_steps
        if progress.validated < progress.iteration and (last or self._due(options.validation_steps)):
            self._validate()
        patience = options.early_stopping_patience
        last = last or (patience is not None and progress.worse_validations >= patience)
        if last or (progress.iteration > 0 and self._due(options.checkpointing_steps)):
            self._save()
        return last

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.iteration % every == 0

    def _validate(self) -> None:
        """Show the averaged model; keep count of validations without a new best score."""
        iteration = self.state.iteration
        with self.processes.together(), self.state.ema_weights():
            score = self.hooks.validate(iteration).get(self.options.early_stopping_metric)
        progress = self.state.progress
        progress.validated = iteration
        if score is None:
            return
        better = progress.best_score is None or score > progress.best_score
        progress.best_score = score if better else progress.best_score
        progress.worse_validations = 0 if better else progress.worse_validations + 1

    def _save(self) -> None:
        """Write a checkpoint unless that of this iteration is written or nothing was done."""
        if self._saved != self.state.iteration:
            self.hooks.save()
            self._saved = self.state.iteration

    def _collect(self) -> Collected:
        """Return training rows of this process's share of the iteration's samples."""
        seed, iteration, batch = self.options.seed, self.state.iteration, self.options.train_batch_size
        samples = share(batch, self.processes)
        rows = prompt_rows(seed, iteration, batch, len(self.prompts), self.options.samples_per_prompt)
        cond = self.hooks.encode([self.prompts[rows[sample]] for sample in samples])
        generators = generators_for(seed, iteration, samples)
        collected = self.method.collect(cond, generators, generator_for(seed, iteration, "shared"))
        for text in collected.warnings if self.processes.is_main else ():
            logger.warning("iteration %d: %s", iteration, text)
        return collected

    def _backward(self, examples: Examples) -> dict[str, float]:
        """Compute gradients of this process's rows; the loss and its other numbers over all processes."""
        self.state.optimizer.zero_grad()
        scaled = ScaledBackward(list(self.state.parameters.values()))
        totals: dict[str, float] = {}
        for example in examples.split(self.options.loss_micro_batch_size):
            with phase("loss", len(example)):
                loss, numbers = self.method.loss(example)
                if not math.isfinite(value := loss.item()):
                    raise NonFiniteError(f"loss is {value} for {example.describe()}")
                scaled.backward(loss, example.weight)
            add_to(totals, {"loss": value, **numbers})
        scaled.finish()
        return self.processes.sum_numbers(totals)

    def _gradient_norm(self) -> float:
        """Sum gradients over processes and clip them; the norm before clipping."""
        parameters = list(self.state.parameters.values())
        self.processes.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm).item()
        if not norm < float("inf"):
            remedy = "lower learning_rate, or use float32 (mixed_precision no)"
            raise NonFiniteError(f"gradient norm is {norm} though the loss is finite: {remedy}")
        return norm
