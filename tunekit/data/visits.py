"""Which pictures stand in which batch: a function of the seed and the batch's place alone.

All batches of a run stand in one row: step after step, micro-batch after micro-batch; several
processes share each of them out. A batch holds pictures of one bucket, since they must have one
shape, and it is always full.

Rounds. An epoch shows every picture once (with repeats: that often). A bucket's pictures seldom
fill whole batches in one epoch, so the row is made of rounds: a round is the smallest number k of
epochs after which every bucket's k * n visits fill whole batches. Each bucket has a row of its own,
a seeded permutation an epoch, one after the other, cut into batches; so at any moment none of its
pictures was seen more than one epoch oftener than another. Which bucket's turn it is, is a
shuffle drawn for each round. After a round every picture was seen exactly k * repeats times,
whatever the sizes and the batch size. With one bucket this is nothing but
permutations, one after the other.

Any batch can be asked for at once: nothing before it has to be computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tunekit.seeding import derive, generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Row = NDArray[np.int64]


@dataclass(frozen=True)
class Visit:
    """One showing of a picture. item: its index. number: which of its visits, from 0."""

    item: int
    number: int


@dataclass(frozen=True)
class Round:
    """How long it takes until every picture was seen equally often.

    epochs: of all pictures. batches: of the row, in these epochs.
    """

    epochs: int
    batches: int


def round_of(buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int) -> Round:
    """Return the round of items in these buckets. Loads nothing, for those who only want to tell.

    buckets: each item's bucket. repeats: each item's visits an epoch. batch_size: 1 or more.
    """
    assert len(buckets) == len(repeats) > 0
    assert batch_size >= 1
    assert min(repeats) >= 1
    counts = _counts(buckets, repeats)
    epochs = math.lcm(*(batch_size // math.gcd(n, batch_size) for n in counts.values()))
    return Round(epochs, epochs * sum(counts.values()) // batch_size)


def expected(
    buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int, batches: int
) -> list[tuple[int, int]]:
    """Return the least and the most visits each item can get in the first `batches` of the row.

    They are exact over all seeds: some order gives each of them. They are equal after whole
    rounds; between, the seed's shuffle decides. For the other parameters see `round_of`.
    """
    full = round_of(buckets, repeats, batch_size)
    whole, rest = divmod(batches, full.batches)
    counts = _counts(buckets, repeats)
    told = []
    for bucket, times in zip(buckets, repeats, strict=True):
        row = full.epochs * counts[bucket] // batch_size
        fewest, most = max(0, rest - (full.batches - row)), min(rest, row)
        epochs, begun = divmod(fewest * batch_size, counts[bucket])
        # Of an epoch that is not over, the others may have come first, or this item.
        least = epochs * times + max(0, begun - (counts[bucket] - times))
        epochs, begun = divmod(most * batch_size, counts[bucket])
        before = whole * full.epochs * times
        told.append((before + least, before + epochs * times + min(begun, times)))
    return told


class Visits:
    """The row of batches over some items; see this module's page. Pure but for what it remembers.

    buckets: each item's bucket, in an order that does not hang on files' names. repeats: each
    item's visits an epoch, 1 or more. seed: any. batch_size: items a batch, 1 or more, which may
    be more than there are.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        repeats: Sequence[int],
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        import numpy as np

        self.round = round_of(buckets, repeats, batch_size)
        self.batch_size = batch_size
        self._seed = seed
        self._repeats = np.asarray(repeats, dtype=np.int64)
        numbers = {bucket: number for number, bucket in enumerate(dict.fromkeys(buckets))}
        self._bucket = np.asarray([numbers[bucket] for bucket in buckets], dtype=np.int64)
        self._slots = np.repeat(np.arange(len(buckets)), self._repeats)  # an item a visit
        self._counts = np.bincount(self._bucket[self._slots])
        # Kept for the last few: a run asks for batches one after the other.
        self._turns = lru_cache(maxsize=2)(self._draw_turns)
        self._epoch = lru_cache(maxsize=8)(self._draw_epoch)

    def __reduce__(self) -> tuple[object, ...]:
        """Let worker processes have a copy: what is remembered is left behind."""
        return _again, (
            self._bucket.tolist(),
            self._repeats.tolist(),
            self._seed,
            self.batch_size,
        )

    def at(self, position: int) -> tuple[Visit, ...]:
        """Return the batch at a place of the row, from 0: `batch_size` visits of one bucket."""
        assert position >= 0
        number, turn = divmod(position, self.round.batches)
        buckets, earlier = self._turns(number)
        bucket = int(buckets[turn])
        count = int(self._counts[bucket])
        first = int(earlier[turn]) * self.batch_size
        found = []
        for place in range(first, first + self.batch_size):
            epoch, at = divmod(place, count)
            epoch += number * self.round.epochs
            items, numbers = self._epoch(epoch)[bucket]
            item = int(items[at])
            found.append(Visit(item, epoch * int(self._repeats[item]) + int(numbers[at])))
        return tuple(found)

    def _draw_turns(self, number: int) -> tuple[Row, Row]:
        """Return a round's buckets in turn, and how many batches of that bucket came before."""
        import numpy as np
        import torch

        shares = self._counts * self.round.epochs // self.batch_size
        turns = np.repeat(np.arange(len(shares)), shares)
        if len(shares) > 1:
            draw = generator(self._seed, "data buckets", number)
            turns = turns[torch.randperm(len(turns), generator=draw).numpy()]
        return turns, _occurrence(turns)

    def _draw_epoch(self, epoch: int) -> list[tuple[Row, Row]]:
        """Return, for each bucket, the epoch's items in order and which repeat of theirs it is."""
        import torch

        draw = generator(self._seed, "data order", epoch)
        items = self._slots[torch.randperm(len(self._slots), generator=draw).numpy()]
        repeat = _occurrence(items)
        bucket = self._bucket[items]
        rows = [bucket == number for number in range(len(self._counts))]
        return [(items[row], repeat[row]) for row in rows]


def variant(seed: int, key: str, visit: int, variants: int) -> int:
    """Return which of a picture's variants a visit shows: all of them before one comes again.

    key: what the picture is. The order of each cycle is drawn from (seed, key, cycle).
    """
    import random

    cycle, place = divmod(visit, variants)
    order = list(range(variants))
    random.Random(derive(seed, f"data variant {key}", cycle)).shuffle(order)
    return order[place]


def _counts(buckets: Sequence[Hashable], repeats: Sequence[int]) -> Counter[Hashable]:
    """Return each bucket's visits an epoch."""
    counts: Counter[Hashable] = Counter()
    for bucket, times in zip(buckets, repeats, strict=True):
        counts[bucket] += times
    return counts


def _occurrence(values: Row) -> Row:
    """Return for each value how many equal ones stand before it."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    ordered = values[order]
    fresh = np.r_[True, ordered[1:] != ordered[:-1]]
    starts = np.maximum.accumulate(np.where(fresh, np.arange(len(values)), 0))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - starts
    return result


def _again(buckets: list[int], repeats: list[int], seed: int, batch_size: int) -> Visits:
    return Visits(buckets, repeats, seed=seed, batch_size=batch_size)
