"""Which shard holds which pairs of a row.

A shard numbers its pairs of a row from 0, in the order in which the row got them. So its oldest pairs are the oldest of
the row that it holds, and whatever drops or takes back pairs of the row does the same to the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """The pairs of one row, a value.

    Args:
        runs: Shards, and how many pairs of the row follow each other there, in the order of the pairs.

    Example:
        >>> row = Row(((0, 2), (1, 3), (0, 1)))
        >>> row.length, row.held(0), row.drop_oldest(3)
        (6, 3, (Row(runs=((1, 2), (0, 1))), {0: 2, 1: 1}))
        >>> row.numbers(0, torch.tensor([0, 2, -1]))
        tensor([ 0,  5, -1])
        >>> row.places(torch.tensor([1, 5, 2]))
        (tensor([0, 0, 1]), tensor([1, 2, 0]))
    """

    runs: Runs = ()

    @cached_property
    def length(self) -> int:
        """Pairs of the row."""
        return sum(count for _, count in self.runs)

    @cached_property
    def _held(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for shard, count in self.runs:
            found[shard] = found.get(shard, 0) + count
        return found

    def held(self, shard: int) -> int:
        """Pairs of the row that a shard holds."""
        return self._held.get(shard, 0)

    def plus(self, shard: int, count: int) -> Row:
        """With more pairs behind."""
        if not count:
            return self
        if self.runs and self.runs[-1][0] == shard:
            return Row((*self.runs[:-1], (shard, self.runs[-1][1] + count)))
        return Row((*self.runs, (shard, count)))

    def drop_oldest(self, count: int) -> tuple[Row, dict[int, int]]:
        """Without the oldest pairs; and how many of them each shard held."""
        gone: dict[int, int] = {}
        for place, (shard, size) in enumerate(self.runs):
            taken = min(size, count)
            gone[shard] = gone.get(shard, 0) + taken
            count -= taken
            if taken < size:
                return Row(((shard, size - taken), *self.runs[place + 1 :])), gone
        return Row(), gone

    def keep(self, mask: Tensor) -> tuple[Row, dict[int, Tensor]]:
        """Pairs where the mask (M,) is True; and the mask of each shard's own."""
        owners = self._owners
        masks = {shard: mask[owners == shard] for shard in self._held}
        kept, counts = torch.unique_consecutive(owners[mask], return_counts=True)
        return Row(tuple(zip(kept.tolist(), counts.tolist(), strict=True))), masks

    def numbers(self, shard: int, local: Tensor) -> Tensor:
        """Numbers in the row of pairs that a shard has numbered itself; -1 stays."""
        mine = self._mine(shard)
        if not len(mine[0]):
            return torch.full_like(local, -1)
        ends, shifts = mine
        place = torch.searchsorted(ends, local.contiguous(), right=True).clamp_max(len(ends) - 1)
        return torch.where(local < 0, local, local + shifts[place])

    def places(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Shards of pairs of the row, and their numbers there."""
        ends, shards, shifts = self._table
        place = torch.searchsorted(ends, numbers.contiguous(), right=True).clamp_max(len(ends) - 1)
        return shards[place], numbers - shifts[place]

    @cached_property
    def _owners(self) -> Tensor:
        shards = torch.tensor([shard for shard, _ in self.runs], dtype=torch.int64)
        return shards.repeat_interleave(torch.tensor([count for _, count in self.runs], dtype=torch.int64))

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each run: the number behind its last pair, its shard, and what numbers there are short of the row's."""
        shards = torch.tensor([shard for shard, _ in self.runs], dtype=torch.int64)
        counts = torch.tensor([count for _, count in self.runs], dtype=torch.int64)
        ends = counts.cumsum(0)
        there, found = dict[int, int](), []
        for (shard, count), start in zip(self.runs, (ends - counts).tolist(), strict=True):
            found.append(start - there.get(shard, 0))
            there[shard] = there.get(shard, 0) + count
        return ends, shards, torch.tensor(found, dtype=torch.int64)

    def _mine(self, shard: int) -> tuple[Tensor, Tensor]:
        """Of a shard's runs: its number behind the last pair, and what its numbers are short of the row's."""
        ends, shards, shifts = self._table
        mine = shards == shard
        return (ends - shifts)[mine], shifts[mine]


def emptiest(rows: Sequence[Row], shards: int) -> int:
    """The shard that holds fewest pairs of all rows."""
    held = [sum(row.held(shard) for row in rows) for shard in range(shards)]
    return held.index(min(held))
