"""Weights of rows by their size: less noise from the few that are long, with the tilt as the fixed point.

Lengths of rows are heavy-tailed. A weight that depends on a row's own length pulls the regression off its
mean; these don't, or not in the end:

- `crossfit`, of the row before the branched step K-2 (continuations.py). With h1 and h2 the mean adjoints of
  two halves of the continuations,

      w1 = f(|h2|),  w2 = f(|h1|);   adjoint = (w1 h1 + w2 h2) / (w1 + w2),   weight = (w1 + w2) / 2

  Given x_{K-2} the halves are independent, so that E[w1 (v - target(h1))] = E[w1] (v - E[target]), which is
  zero at the same v as without weights: exact. f(n) = m / max(n, FLOOR m), m a running mean of the norms of
  *earlier* iterations: no sample has a part in its own.
- `ramp`: rows of step k are shortened to c_k, weight min(1, c_k / |row|), c_k a running quantile that goes
  from START to 1 in the first SHARE of the run. From there on weights are 1: the fixed point is the tilt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_diffusers.matching import QuantileMask

FLOOR, DECAY = 0.1, 0.9
START, SHARE = 0.9, 0.6


class Crossfit:
    """Weights of the halves of the continuations by each other's norm."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def __call__(self, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted mean (B, ...) of adjoints of continuations (M, B, ...), and weights (B,)."""
        if self._mean is None:  # no earlier iteration
            return adjoints.mean(0), adjoints.new_ones(adjoints.shape[1])
        first, second = halves(adjoints)
        w1, w2 = self._weight(second), self._weight(first)
        share = (w1 / (w1 + w2)).view(-1, *[1] * (first.ndim - 1))
        return torch.lerp(second, first, share), (w1 + w2) / 2

    def _weight(self, adjoint: Tensor) -> Tensor:
        assert self._mean is not None
        return self._mean / adjoint.flatten(1).norm(dim=1).clamp(min=FLOOR * self._mean)

    def update(self, norms: Tensor) -> None:
        """Move the mean by the norms of an iteration's halves, of all ranks."""
        new = norms.double().mean().item()
        if new > 0:
            self._mean = new if self._mean is None else DECAY * self._mean + (1 - DECAY) * new

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean, JSON-serialisable."""
        return {"mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._mean = state.get("mean")


def halves(adjoints: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (B, ...) of two halves of M >= 2 continuations (M, B, ...)."""
    number = len(adjoints) // 2
    return adjoints[:number].mean(0), adjoints[number:].mean(0)


def half_norms(adjoints: Tensor) -> Tensor:
    """Return the mean norm of the two halves of each sample, (B,)."""
    return torch.stack([half.flatten(1).norm(dim=1) for half in halves(adjoints)]).mean(0)


class Ramp(QuantileMask):
    """Weights that shorten rows to a running quantile of their step, in the first part of a run.

    Args:
        iterations: how many make the run: `update` counts them.
    """

    def __init__(self, iterations: int) -> None:
        super().__init__(START, DECAY)
        self.last, self._done = SHARE * iterations, 0

    @property
    def off(self) -> bool:
        """Return whether all weights are 1 from now on."""
        return self._done > self.last

    def update(self, steps: Sequence[int], residuals: Tensor) -> None:
        """Move the thresholds as a mask's, and its quantile towards 1."""
        self.quantile = min(1.0, START + (1 - START) * self._done / max(self.last, 1))
        self._done += 1
        if not self.off:
            super().update(steps, residuals)

    def weights(self, steps: Sequence[int], residuals: Tensor) -> Tensor:
        """Return factors (B, S) in (0, 1] of the rows with these residuals (B, S)."""
        if self.off:
            return torch.ones_like(residuals)
        tiny = torch.finfo(torch.float64).tiny
        sizes = residuals.double().sqrt().clamp(min=tiny)
        return (self.thresholds(steps, residuals) / sizes).clamp(max=1).to(residuals)

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds and the number of iterations, JSON-serialisable."""
        return {"thresholds": super().state_dict(), "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state.get("thresholds", {}))
        self._done = state.get("done", 0)
