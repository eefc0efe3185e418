"""A first-in first-out buffer of rows of several tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Buffer:
    """The last `capacity` rows, from which minibatches are drawn with replacement.

    Args:
        capacity: number of rows kept, the oldest go first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(next(iter(self._rows.values()))) if self._rows else 0

    def push(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows of tensors by name, as many of each."""
        for name, new in rows.items():
            old = self._rows.get(name)
            self._rows[name] = (new if old is None else torch.cat([old, new]))[-self.capacity :]

    def draw(self, number: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw rows at random.

        Args:
            number: how many.
            generator: CPU generator.
        """
        picked = torch.randint(len(self), (number,), generator=generator)
        return {name: rows[picked] for name, rows in self._rows.items()}

    def clear(self) -> None:
        """Forget all rows."""
        self._rows = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return all rows, the oldest first."""
        return dict(self._rows)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._rows = dict(state)
