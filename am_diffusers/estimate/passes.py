"""Stand-ins for what a method calls: each kind of pass is run once, without data, and then only counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_diffusers.estimate.pretend import Pretence
from am_diffusers.estimate.tracker import Tracker, Usage
from am_diffusers.models.base import AdapterField
from am_diffusers.terminal_cost import RewardOfLatents, Terminal, TerminalCost
from am_diffusers.velocity import Conditioning, Pull

ROLLOUT, ADJOINT, REWARD = "rollout", "adjoint", "VAE and reward"
LOSS, STEP, SAMPLING = "loss backward", "optimizer step", "grids and evaluation"
Costs = dict[tuple[object, ...], Usage]


@dataclass(frozen=True)
class Noise:
    """Latents without data, in the place of `LatentSpec`."""

    pretence: Pretence
    shape: tuple[int, ...]
    device: str = "cpu"

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw one latent per generator."""
        return self.pretence.empty(len(generators), *self.shape)


class Field:
    """A transformer's velocity field, each kind of call run once and then only counted."""

    def __init__(self, field: AdapterField, tracker: Tracker, costs: Costs) -> None:
        self._field, self._tracker, self._costs = field, tracker, costs
        self._graph = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity; with gradient, as in the loss, it is the field's own."""
        if torch.is_grad_enabled():
            return self._field(x, sigma, cond)
        key = ("call", self._field.adapter, x.shape)
        if key not in self._costs:
            self._costs[key] = self._tracker.cost(lambda: self._field(x, sigma, cond))
        self._tracker.replay(self._costs[key])
        return torch.empty_like(x)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return velocity and pull-back; between them the graph is held."""
        key, tracker = ("vjp", self._field.adapter, x.shape), self._tracker
        graph = ("graph", *key)
        with tracker.phase(ADJOINT):
            if key not in self._costs:
                self._costs[key] = tracker.cost(lambda: self._vjp(x, sigma, cond))
                self._costs[graph] = Usage(self._graph)
            tracker.replay(self._costs[key])
        size = self._costs[graph].peak
        tracker.live += size  # held until the pull-back: other phases find it there

        def pull(cotangent: Tensor) -> Tensor:
            tracker.live -= size
            return torch.empty_like(x)

        return torch.empty_like(x), pull

    def _vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> None:
        before = self._tracker.live
        velocity, pull = self._field.vjp(x, sigma, cond)
        self._graph = self._tracker.live - before
        pull(torch.zeros_like(velocity))


class TerminalPass(TerminalCost):
    """A `TerminalCost` of which one pass of VAE and rewards is run and then only counted."""

    def __init__(self, tracker: Tracker, reward: RewardOfLatents, *settings: Any) -> None:
        super().__init__(reward, *settings)
        self._tracker, self._costs = tracker, dict[tuple[object, ...], Usage]()

    def __call__(self, final: Tensor, prompts: Sequence[str], noise: Callable[[], Tensor]) -> Terminal:
        """Return rewards and adjoints without data."""
        size, run = min(self.options.batch_size or len(final), len(final)), super().__call__
        if (size,) not in self._costs:
            part = final[:size]
            self._costs[size,] = self._tracker.cost(
                lambda: run(part, prompts[:size], lambda: torch.empty_like(part))
            )
        with self._tracker.phase(REWARD):
            self._tracker.replay(self._costs[size,], len(final) / size)
        rewards, norms, slopes = (final.new_empty(len(final)) for _ in range(3))
        return Terminal(rewards, torch.empty_like(final), norms, slopes)

    def update(self, gradient_norms: Tensor) -> None:
        """Do nothing: thresholds hold no memory."""


class RewardPass:
    """A reward of latents that is taken without gradient: a pass is run once for each number of samples."""

    def __init__(self, reward: RewardOfLatents, tracker: Tracker) -> None:
        self._reward, self._tracker = reward, tracker
        self._costs: Costs = {}

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards without data."""
        key = (len(latents),)
        if key not in self._costs:
            self._costs[key] = self._tracker.cost(lambda: self._reward(latents, prompts))
        with self._tracker.phase(REWARD):
            self._tracker.replay(self._costs[key])
        return latents.new_empty(len(latents))
