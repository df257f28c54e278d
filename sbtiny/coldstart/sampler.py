"""The order of training rows: the answers to one question in one update, like lengths together, and otherwise at random."""

import random
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby

from torch.utils.data import Sampler

POOL = 50  # batches that are sorted together: like enough in length, and still other rows together in each epoch


class Together(Sampler[int]):
    """Indices of rows, batch after batch; an epoch's order follows from seed and epoch alone, so that a run cut anywhere goes on exactly.

    Rows of one question follow each other in `questions` and stand in one batch: what differs between them in the update's gradient is the
    number and the length it stands for. With each in a batch of its own length the length of all is learnt long before the number is read.
    Within a batch rows are sorted, so that micro-batches hold little padding.
    """

    def __init__(self, lengths: Sequence[int], questions: Sequence[Hashable], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0
        self.units = [list(rows) for _, rows in groupby(range(len(lengths)), key=questions.__getitem__)]

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        units, size = rng.sample(self.units, len(self.units)), self.batch
        pool = max(1, POOL * size * len(units) // max(1, len(self)))  # units, of as many rows as POOL batches have
        batches, rest = [], []
        for at in range(0, len(units), pool):
            rows = [row for unit in sorted(units[at : at + pool], key=self._size) for row in unit]
            whole = len(rows) // size * size
            batches += [rows[first : first + size] for first in range(0, whole, size)]
            rest += rows[whole:]
        rng.shuffle(batches)
        batches += [rest[first : first + size] for first in range(0, len(rest), size)]  # a short one must be last: the loader cuts by count
        return iter([row for batch in batches for row in sorted(batch, key=self.lengths.__getitem__)])

    def _size(self, unit: Sequence[int]) -> tuple[int, int]:
        """Units of as many rows beside each other, the largest first, and of those the ones with like longest row."""
        return -len(unit), max(self.lengths[row] for row in unit)
