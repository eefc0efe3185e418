"""State that iterations change and a restart keeps: parameters, optimizer, schedule, EMA, counters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.training_utils import EMAModel

HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


@dataclass
class Progress:
    """Counters of a run.

    Attributes:
        iteration: iterations finished, skipped ones included.
        skipped: finished iterations whose optimizer step was left out because something was not finite.
        skipped_in_a_row: how many of the last ones.
        validated: iteration of the last validation; -1 before the first.
        best_score: largest validation score so far; None before the first.
        worse_validations: validations since then.
    """

    iteration: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    validated: int = -1
    best_score: float | None = None
    worse_validations: int = 0


@dataclass
class TrainState:
    """All that an iteration changes, besides the method's own state.

    Attributes:
        parameters: trained parameters by name, the same on all processes.
        optimizer: over `parameters`, in this order.
        lr_schedule: stepped once an iteration.
        ema: running mean of the parameters, None without.
        progress: counters.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def iteration(self) -> int:
        """Iterations finished."""
        return self.progress.iteration

    def step(self) -> None:
        """Take the optimizer step and update the EMA."""
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step(self.parameters.values())

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Let the parameters be their running means inside the block; without EMA, as they are."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and text; later iterations change the tensors, not the numbers."""
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it belongs to other parameters, or only one of both has an EMA; nothing is
                changed then.
        """
        self._check(state)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["parameters"][name])
        self._load_optimizer(state["optimizer"], state["lr_schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"] | {"decay": self.ema.decay})
            self.ema.to(device=next(iter(self.parameters.values())).device)
        self.progress = Progress(**state["progress"])

    def _load_optimizer(self, optimizer: dict[str, Any], lr_schedule: dict[str, Any]) -> None:
        """Restore moments and the schedule's place; rates and decays are this run's own."""
        own = [{k: v for k, v in g.items() if k in HYPERPARAMETERS} for g in self.optimizer.param_groups]
        schedule = self.lr_schedule
        self.optimizer.load_state_dict(optimizer)
        schedule.load_state_dict(lr_schedule | {"base_lrs": schedule.base_lrs})
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        for group, kept, rate in zip(self.optimizer.param_groups, own, rates, strict=True):
            group.update(kept | {"lr": rate})

    def _check(self, state: Mapping[str, Any]) -> None:
        ours = {name: tuple(p.shape) for name, p in self.parameters.items()}
        theirs = {name: tuple(p.shape) for name, p in state["parameters"].items()}
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the checkpoint's {name} has shape {theirs.get(name)}, this run's {ours.get(name)}: "
                    "model, rank and lora_layers must be those it was made with"
                )
        if (self.ema is None) != (state["ema"] is None):
            raise ValueError("use_ema must be as it was when the checkpoint was made")
