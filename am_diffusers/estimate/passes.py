"""Stand-ins for what a method calls: each kind of pass is run once, without data, and then only counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_diffusers.estimate.pretend import Pretence
from am_diffusers.estimate.tracker import Tracker, Usage
from am_diffusers.models.base import AdapterField
from am_diffusers.terminal_cost import RewardOfLatents, Terminal, TerminalCost
from am_diffusers.velocity import Conditioning, Cotangent

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
        """As many latents as generators."""
        return self.pretence.empty(len(generators), *self.shape)


class Field:
    """A transformer's velocity field, each kind of call run once and then only counted."""

    def __init__(self, field: AdapterField, tracker: Tracker, costs: Costs) -> None:
        self._field, self._tracker, self._costs = field, tracker, costs
        self._graph = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity; with gradient, as in the loss, it is the field's own."""
        if torch.is_grad_enabled():
            return self._field(x, sigma, cond)
        key = ("call", self._field.adapter, x.shape)
        if key not in self._costs:
            self._costs[key] = self._tracker.cost(lambda: self._field(x, sigma, cond))
        self._tracker.replay(self._costs[key])
        return torch.empty_like(x)

    def vjp(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, cotangent: Cotangent
    ) -> tuple[Tensor, Tensor]:
        """Velocity and vector-Jacobian product; a function as cotangent runs beside the graph between."""
        key, tracker = ("vjp", self._field.adapter, x.shape), self._tracker
        graph = ("graph", *key)
        with tracker.phase(ADJOINT):
            if key not in self._costs:
                self._costs[key] = tracker.cost(lambda: self._vjp(x, sigma, cond))
                self._costs[graph] = Usage(self._graph)
            tracker.replay(self._costs[key])
        velocity = torch.empty_like(x)
        if callable(cotangent):
            with tracker.holding(self._costs[graph].peak), tracker.phase(REWARD):
                cotangent(velocity)
        return velocity, torch.empty_like(x)

    def _vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> None:
        before = self._tracker.live

        def cotangent(velocity: Tensor) -> Tensor:
            self._graph = self._tracker.live - before
            return torch.zeros_like(velocity)

        self._field.vjp(x, sigma, cond, cotangent)


class TerminalPass:
    """A `TerminalCost` of which one pass of VAE and rewards is run and then only counted."""

    def __init__(self, terminal: TerminalCost, tracker: Tracker) -> None:
        self._terminal, self._tracker = terminal, tracker
        self._costs: Costs = {}

    def __call__(self, final: Tensor, prompts: Sequence[str], noise: Callable[[], Tensor]) -> Terminal:
        """Rewards and adjoints without data."""
        size = min(self._terminal.options.batch_size or len(final), len(final))
        if (size,) not in self._costs:
            part = final[:size]
            self._costs[size,] = self._tracker.cost(
                lambda: self._terminal(part, prompts[:size], lambda: torch.empty_like(part))
            )
        with self._tracker.phase(REWARD):
            self._tracker.replay(self._costs[size,], len(final) / size)
        rewards, norms, slopes = (final.new_empty(len(final)) for _ in range(3))
        return Terminal(rewards, torch.empty_like(final), norms, slopes)

    def update(self, gradient_norms: Tensor) -> None:
        """Nothing: thresholds hold no memory."""


class RewardPass:
    """A reward of latents that is taken without gradient: a pass is run once for each number of samples."""

    def __init__(self, reward: RewardOfLatents, tracker: Tracker) -> None:
        self._reward, self._tracker = reward, tracker
        self._costs: Costs = {}

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards without data."""
        key = (len(latents),)
        if key not in self._costs:
            self._costs[key] = self._tracker.cost(lambda: self._reward(latents, prompts))
        with self._tracker.phase(REWARD):
            self._tracker.replay(self._costs[key])
        return latents.new_empty(len(latents))
