"""Difference of two sets of arrays: `max |a - b| / max |b|`, b the original package's."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LIMIT = 1e-5
# Compared quantities in the order of the table, and their names there.
QUANTITIES = {
    "token_ids": "token ids",
    "score": "score, equal pixels",
    "gradient": "gradient by pixel",
    "official_pixels": "prepared images, official path",
    "official_score": "score, official path",
    "picture_gradient": "gradient by image, resize included",
}
OPTIONAL = {"picture_gradient"}
EXACT = {"token_ids"}


@dataclass(frozen=True)
class Comparison:
    """One quantity of one model on both sides.

    Attributes:
        quantity: name in `QUANTITIES`.
        count: numbers compared.
        difference: `max |a - b| / max |b|`, infinite if anything isn't finite.
        spread: standard deviation of b over `max |b|`; a difference says little about nearly constant scores.
    """

    quantity: str
    count: int
    difference: float
    spread: float

    @property
    def limit(self) -> float:
        """The largest difference that passes."""
        return 0.0 if self.quantity in EXACT else LIMIT

    @property
    def passed(self) -> bool:
        """True if the difference is within the limit, and the numbers vary enough for that to count."""
        return self.difference <= self.limit and self.spread > 100 * LIMIT


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return `max |a - b| / max |b|` in float64; infinite if a number isn't finite.

    Raises:
        ValueError: if the shapes differ, or there is nothing to compare with.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"expected equal shapes, got {ours.shape} and {theirs.shape}")
    first, second = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("inf")
    largest = np.abs(second).max(initial=0.0)
    if largest == 0:
        raise ValueError("the original package's numbers are all 0: nothing to compare")
    return float(np.abs(first - second).max() / largest)


def compare(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Compare all quantities that one side or the other gives.

    Raises:
        ValueError: if a side lacks one that the other has, or that every model has; or see above.
    """
    if ours.keys() != theirs.keys() or not QUANTITIES.keys() - OPTIONAL <= ours.keys() <= QUANTITIES.keys():
        raise ValueError(
            f"expected {list(QUANTITIES)} of both sides, got {sorted(ours)} and {sorted(theirs)}"
        )
    rows = []
    for name in (name for name in QUANTITIES if name in ours):
        numbers = theirs[name].astype(np.float64)
        difference = relative_difference(ours[name], theirs[name])
        spread = float(numbers.std() / np.abs(numbers).max())
        rows.append(Comparison(name, numbers.size, difference, spread))
    return rows
