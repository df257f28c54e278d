"""The order of training rows: the answers to a question in one update, like lengths together, otherwise random."""

import random
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby

from torch.utils.data import Sampler

POOL_BATCHES = 50  # batches sorted together: enough for like lengths, few enough to mix rows anew each epoch


class GroupedLengthSampler(Sampler[int]):
    """Row indices, batch after batch. The order follows from seed and epoch alone, so that a stopped run resumes exactly.

    Rows of one question must be neighbours in `questions`; they share a batch. In its gradient they then differ by budget and length alone.
    In batches of one length each, the length is learnt long before the budget is read. Rows of a batch are sorted by length, for little
    padding in micro-batches.
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
        pool = max(1, POOL_BATCHES * size * len(units) // max(1, len(self)))  # in units; about POOL_BATCHES batches of rows
        batches, rest = [], []
        for start in range(0, len(units), pool):
            rows = [row for unit in sorted(units[start : start + pool], key=self._size) for row in unit]
            whole = len(rows) // size * size
            batches += [rows[first : first + size] for first in range(0, whole, size)]
            rest += rows[whole:]
        rng.shuffle(batches)
        batches += [rest[first : first + size] for first in range(0, len(rest), size)]  # the short batch last: the loader cuts by count
        return iter([row for batch in batches for row in sorted(batch, key=self.lengths.__getitem__)])

    def _size(self, unit: Sequence[int]) -> tuple[int, int]:
        """Sort key of a question's rows: by their count, the most first, then by the longest."""
        return -len(unit), max(self.lengths[row] for row in unit)
