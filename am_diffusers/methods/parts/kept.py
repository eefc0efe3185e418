"""Storage of a method from iteration to iteration: its size, and how ranks share what others saved."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PartShare:
    """The samples of this rank among those that ranks saved in parts, however many ranks there are now.

    All ranks had as many samples, and all have, in rank order: rank r of R has the r-th of R equal shares.

    Attributes:
        rank: this one, from 0.
        ranks: how many there are now.
        parts: how many there were.
    """

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    @property
    def needed(self) -> range:
        """The parts that this rank's samples are in: with as many ranks as before, its own alone."""
        return range(self.rank * self.parts // self.ranks, -(-(self.rank + 1) * self.parts // self.ranks))

    def rows(self, samples: int) -> slice:
        """This rank's samples among the `samples` that the needed parts hold together.

        Raises:
            ValueError: if they can't be shared evenly.
        """
        of_a_part, rest = divmod(samples, len(self.needed))
        total = of_a_part * self.parts
        if rest or total % self.ranks:
            raise ValueError(
                f"{total} samples saved by {self.parts} processes can't be shared by {self.ranks}: go on "
                "with a number of processes that divides them"
            )
        first = self.rank * total // self.ranks - self.needed.start * of_a_part
        return slice(first, first + total // self.ranks)


@dataclass(frozen=True)
class KeptBytes:
    """Bytes of latents and targets that a method keeps, over all ranks.

    Attributes:
        stored: bytes that are kept from iteration to iteration, also in a checkpoint.
        falling_out: the oldest rows, kept where they lie until the iteration that replaced them has
            succeeded.
        drawn: in main memory, rows as they are drawn and the copy of those to train on (then in its place,
            for a GPU, a pinned one).
        in_memory: whether what is stored lies in main memory.
    """

    stored: int = 0
    falling_out: int = 0
    drawn: int = 0
    in_memory: bool = True

    def of_one(self, ranks: int) -> "KeptBytes":
        """Return the share of one of several ranks."""
        return KeptBytes(self.stored // ranks, self.falling_out // ranks, self.drawn // ranks, self.in_memory)

    @property
    def peak(self) -> int:
        """Most that is held at a time, in an iteration that collects."""
        return self.stored + self.falling_out + self.drawn
