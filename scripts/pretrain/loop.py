"""A small resumable training loop, shared by the stages of `pretrain_tiny.py`."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of parameters, warmed up as min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the averages towards the module's current state."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module with the averaged weights, for evaluation and saving."""
        own = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.values)
        yield
        module.load_state_dict(own)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, constant, then linear to 5 % over the last quarter."""
    cooldown = max(1, steps // 4)
    return peak * min(1.0, (step + 1) / 100) * max(0.05, min(1.0, (steps - step) / cooldown))


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    peak_rate: float,
    state_file: Path,
    weight_decay: float = 0.01,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> Ema:
    """Train `module` for `steps`, saving every 5 minutes and continuing from `state_file` if it exists.

    `loss_of_step(step)` derives its randomness from the step alone, so a killed run loses at most 5 minutes.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=peak_rate, weight_decay=weight_decay, betas=(0.9, 0.99)
    )
    ema, first = Ema(module), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.values, ema.updates, first = state["ema"], state["updates"], state["step"]
    saved = shown = time.time()
    log = state_file.with_suffix(".jsonl").open("a")
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        loss, metrics = loss_of_step(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(module)
        last = step + 1 == steps
        if time.time() - shown > 30 or last:
            shown = time.time()
            row = {
                "step": step + 1,
                "time": round(shown),
                "loss": loss.item(),
                "norm": norm.item(),
                **metrics,
            }
            print(json.dumps(row), file=log, flush=True)
        if time.time() - saved > 300 or last:
            saved = time.time()
            save_state(state_file, module, optimizer, ema, step + 1)
            if evaluate is not None:
                with ema.applied(module):
                    print(json.dumps({"step": step + 1, **evaluate(step + 1)}), file=log, flush=True)
    return ema


def save_state(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int) -> None:
    """Write the training state, replacing the previous one in one rename."""
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state |= {"ema": ema.values, "updates": ema.updates}
    torch.save(state, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)
