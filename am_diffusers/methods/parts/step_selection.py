"""Selection of the denoising steps that an iteration trains on, and the factors that keep the loss unbiased.

The loss over all N steps with noise is estimated from n of them. A step that is selected with probability
pi_k counts n / (N pi_k) times in the mean over the selected rows, so that the expectation over selections is
the mean over all steps: exactly without a mask, and with one as far as it keeps the same share of every step.

- `last_and_random`, as published (arXiv 2409.08861): the last n // 2 steps always, others drawn at random,
  all with factor 1. Not an unbiased estimate: it weighs the last steps more. Among the others one with sigma
  at most LATE is `odds` times likelier than an earlier one, uniform as published with 1. Any positive odds
  leave the fixed point alone, which is each step's own.
- `stratified`: one step from each of n runs of neighbouring steps.
- `pps` (probability proportional to size): proportional to a running mean of each step's residual, mixed
  with a share `UNIFORM` of equal ones; steps whose probability would exceed 1 are always taken. Systematic
  sampling: one random number, then equal strides along the cumulative sum of the probabilities (Madow 1949).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from am_diffusers.transitions import Transitions

Selection = Literal["last_and_random", "stratified", "pps"]
SELECTIONS = ("last_and_random", "stratified", "pps")
UNIFORM = 0.3
LATE = 0.7
"""Noise level from which on a step is late: on images earlier ones carry hardly any signal at first."""


class Selected(NamedTuple):
    """Steps to train on, increasing, and the factor of each in the loss."""

    steps: list[int]
    factors: list[float]


class StepSelection:
    """Selects steps; for `pps` it follows their residuals.

    Args:
        steps: how many, or all of those with noise.
        kind: see the module docstring.
        odds: how many times likelier a late step is, positive; for `last_and_random`.
        decay: decay of the running means of the residuals, in [0, 1).

    Raises:
        ValueError: if `kind` is unknown, or steps are to be selected from all by anything but the default.
    """

    def __init__(
        self,
        steps: int | Literal["all"],
        kind: Selection = "last_and_random",
        *,
        odds: float = 1.0,
        decay: float = 0.9,
    ) -> None:
        if kind not in SELECTIONS:
            raise ValueError(f"step_selection must be one of {', '.join(SELECTIONS)}, got {kind!r}")
        if steps == "all" and kind != "last_and_random":
            raise ValueError(f"step_selection {kind} selects nothing from all steps: give their number")
        self.steps: int | Literal["all"] = steps
        self.kind, self.odds, self.decay = kind, odds, decay
        self._residuals: dict[int, float] = {}

    def select(self, table: Transitions, generator: torch.Generator) -> Selected:
        """Steps of a table, drawn from the generator that all ranks share.

        Raises:
            ValueError: if a step before the last adds no noise, or there are not so many steps.
        """
        published = select_steps(table, self.steps, generator, self.odds)  # also checks the table
        total, number = table.num_steps - 1, len(published)
        if self.kind == "last_and_random" or number == total:
            return Selected(published, [1.0] * number)
        if self.kind == "stratified":
            edges = [i * total // number for i in range(number + 1)]
            sizes = [right - left for left, right in pairwise(edges)]
            steps = [
                left + int(torch.randint(size, (), generator=generator))
                for left, size in zip(edges, sizes, strict=False)
            ]
            return Selected(steps, [size * number / total for size in sizes])
        chances = inclusion(self._shares(total), number)
        steps = systematic(chances, generator)
        return Selected(steps, [number / (total * chances[k].item()) for k in steps])

    def update(self, steps: Sequence[int], residuals: Tensor, keep: Tensor) -> None:
        """Move the means by the residuals (samples of all ranks, S) of rows that the mask keeps (same)."""
        if self.kind != "pps":
            return
        kept = keep.double()
        sums, counts = (residuals.double() * kept).sum(0), kept.sum(0)
        for step, total, count in zip(steps, sums.tolist(), counts.tolist(), strict=True):
            if count:
                mean = total / count
                old = self._residuals.setdefault(step, mean)
                self._residuals[step] = self.decay * old + (1 - self.decay) * mean

    def state_dict(self) -> dict[str, float]:
        """Mean residual by step, JSON-serialisable."""
        return {str(step): value for step, value in self._residuals.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._residuals = {int(step): value for step, value in state.items()}

    def _shares(self, total: int) -> Tensor:
        """Shares of the sum of the steps' sizes, (total,); steps not seen yet are of mean size."""
        known = list(self._residuals.values())
        mean = sum(known) / len(known) if known else 1.0
        sizes = torch.tensor([self._residuals.get(k, mean) for k in range(total)], dtype=torch.float64)
        equal = torch.full_like(sizes, 1 / total)
        return equal if sizes.sum() == 0 else torch.lerp(sizes / sizes.sum(), equal, UNIFORM)


def inclusion(shares: Tensor, number: int) -> Tensor:
    """Probabilities at most 1 that sum to `number`, proportional to `shares` (N,) > 0 where below 1, (N,)."""
    certain = torch.zeros_like(shares, dtype=torch.bool)
    while True:
        rest = number - int(certain.sum())
        chances = torch.where(certain, 1.0, rest * shares / shares[~certain].sum())
        if not (chances > 1).any():
            return chances
        certain |= chances > 1


def systematic(chances: Tensor, generator: torch.Generator) -> list[int]:
    """Places drawn with the given probabilities (N,) <= 1, whose sum, an integer, is the number of places."""
    ends = chances.cumsum(0)
    number = round(ends[-1].item())
    ends[-1] = number  # without its rounding error
    points = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(number)
    return torch.searchsorted(ends, points, right=True).tolist()


def draw_steps(table: Transitions, steps: int | Literal["all"], generator: torch.Generator) -> list[int]:
    """Return `steps` of the K - 1 steps with noise, drawn uniformly, increasing; or all.

    Raises:
        ValueError: if a step before the last adds no noise, or `steps` is not in 1 .. K-1.
    """
    number = check_steps(table, steps)
    if steps == "all":
        return list(range(number))
    return sorted(torch.randperm(number, generator=generator)[:steps].tolist())


def check_steps(table: Transitions, steps: int | Literal["all"]) -> int:
    """Number K - 1 of steps with noise, of which `steps` can be trained on.

    Raises:
        ValueError: if a step before the last adds no noise, or `steps` is not in 1 .. K-1.
    """
    num_steps = table.num_steps - 1
    if num_steps < 1 or not (table.std[:-1] > 0).all() or table.std[-1] != 0:
        raise ValueError("the method needs noise in every step but the last: use a memoryless table")
    if steps != "all" and not 1 <= steps <= num_steps:
        raise ValueError(f"steps to train on: expected 1 .. {num_steps} or 'all', got {steps}")
    return num_steps


def select_steps(
    table: Transitions, steps: int | Literal["all"], generator: torch.Generator, odds: float = 1.0
) -> list[int]:
    """Steps to train on, increasing: the last `steps` // 2 with noise and random others, or all.

    Args:
        table: the table of the rollout.
        steps: how many.
        generator: draws the others, none of them twice.
        odds: how many times likelier than an earlier step one with sigma at most LATE is, each time.

    Raises:
        ValueError: if a step before the last adds no noise, or `steps` is not in 1 .. K-1.
    """
    num_steps = check_steps(table, steps)
    if steps == "all":
        return list(range(num_steps))
    num_last = steps // 2
    total, number = num_steps - num_last, steps - num_last
    if odds == 1:
        others = torch.randperm(total, generator=generator)[:number]
    else:
        late = (table.sigmas[:total] <= LATE + 1e-9).double()
        others = torch.multinomial(1 + (odds - 1) * late, number, generator=generator)
    return sorted(others.tolist()) + list(range(total, num_steps))
