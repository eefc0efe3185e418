"""A small resumable training loop, shared by the stages of `pretrain_tiny.py`."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SAVE_EVERY, SHOW_EVERY = 180, 20  # seconds

LossOfStep = Callable[[int], tuple[Tensor, dict[str, float]]]


@contextmanager
def fast(device: torch.device) -> Iterator[None]:
    """Compute in bfloat16; on the CPU with the plain attention kernel, whose backward pass is the faster."""
    kernel = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(kernel):
        yield


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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 100 steps, stay constant, then fall to 2 % over the last quarter."""
    cooldown = max(1, steps // 4)
    return peak * min(1.0, (step + 1) / 100) * max(0.02, min(1.0, (steps - step) / cooldown))


@dataclass(frozen=True)
class Loop:
    """How long, where and by how many images a step a stage trains.

    Attributes:
        folder: of states, logs and results.
        steps: optimizer steps in all.
        batch: images a step.
        device: the network's.
    """

    folder: Path
    steps: int
    batch: int
    device: torch.device

    def train(
        self,
        module: nn.Module,
        loss_of_step: LossOfStep,
        *,
        peak_rate: float,
        name: str,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
    ) -> Ema:
        """Train `module`, saving `{name}.pt` every 3 minutes and continuing from it if it exists.

        `loss_of_step(step)` derives its randomness from the step alone, so a killed run loses 3 minutes.
        """
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=peak_rate, weight_decay=weight_decay, betas=(0.9, 0.99)
        )
        ema, file = Ema(module, ema_decay), self.folder / f"{name}.pt"
        first = load_state(file, module, optimizer, ema) if file.exists() else 0
        saved = shown = time.time()
        log = file.with_suffix(".jsonl").open("a")
        for step in range(first, self.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.steps, peak_rate)
            loss, metrics = loss_of_step(step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(module)
            last = step + 1 == self.steps
            if time.time() - shown > SHOW_EVERY or last:
                shown = time.time()
                row = {"step": step + 1, "time": round(shown), "loss": loss.item(), "norm": norm.item()}
                print(json.dumps(row | metrics), file=log, flush=True)
            if time.time() - saved > SAVE_EVERY or last:
                saved = time.time()
                save_state(file, module, optimizer, ema, step + 1)
        return ema


def load_state(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    """Read a training state into its parts; the step to go on with."""
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["ema"].items():
        ema.values[name].copy_(value)
    ema.updates = state["updates"]
    return state["step"]


def save_state(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int) -> None:
    """Write the training state, replacing the previous one in one rename."""
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state |= {"ema": ema.values, "updates": ema.updates}
    torch.save(state, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def gather(file: Path, parts: int, make: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make numbered parts of a data set and join them; `file` keeps what is made, every 3 minutes."""
    rows = torch.load(file, weights_only=True) if file.exists() else []
    saved = time.time()
    for number in range(len(rows), parts):
        rows.append(make(number))
        if time.time() - saved > SAVE_EVERY or number + 1 == parts:
            saved = time.time()
            torch.save(rows, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
    return {name: torch.cat([row[name] for row in rows[:parts]]) for name in rows[0]}
