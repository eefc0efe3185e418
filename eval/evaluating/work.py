"""Who does what: chunks of candidates, shared over shards and processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluating.candidates import Candidate


@dataclass(frozen=True)
class Share:
    """This process's part of all work.

    Attributes:
        worker: which one this is, over all shards and processes, from 0.
        workers: how many there are.
    """

    worker: int
    workers: int

    def of(self, candidates: Sequence[Candidate], num_chunks: int) -> list[tuple[Candidate, list[int]]]:
        """Its chunks of each candidate; neighbours go to different workers, and every chunk to one."""
        units = [(candidate, chunk) for candidate in candidates for chunk in range(num_chunks)]
        mine = units[self.worker :: self.workers]
        return [(candidate, [c for other, c in mine if other == candidate]) for candidate in candidates]
