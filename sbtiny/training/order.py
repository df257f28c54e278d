"""The order of training rows: like lengths together, so that little is padding, and otherwise at random."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

POOL = 50  # batches that are sorted together: like enough in length, and still other rows together in each epoch


class ByLength(Sampler[int]):
    """Indices of rows, batch after batch; an epoch's order follows from seed and epoch alone, so that a run cut anywhere goes on exactly.

    Transformers' own sampler draws from what the process drew before, and leaves the batches of a pool sorted: the rows that teach only the
    number are the shortest and would come in blocks of their own.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        rows = rng.sample(range(len(self)), len(self))
        size, pool = self.batch, POOL * self.batch
        pools = [sorted(rows[at : at + pool], key=self.lengths.__getitem__) for at in range(0, len(rows), pool)]
        batches = [rows[at : at + size] for rows in pools for at in range(0, len(rows), size)]
        short = [batches.pop()] if len(rows) % size else []  # the loader cuts every `size` rows, so that one stays last
        rng.shuffle(batches)
        return iter([row for batch in [*batches, *short] for row in batch])
