"""Asking all shards of a layer for attention, in one call or two: see ``attention``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fot.memory.found import Attended, Scoring
from lightning_fot.shards.attention import Part, attend_scored, capped, joined, winners
from lightning_fot.shards.group import Group, Version
from lightning_fot.shards.packing import Packed, pack, unpack
from lightning_fot.shards.placement import Row

# At most so many bytes of values travel to spare a second call.
ONE_CALL_BYTES = 1 << 19


@dataclass(frozen=True)
class Held:
    """What a layer holds.

    Args:
        versions: One of each shard.
        rows: Which shard has which pairs of each row.
        dropped: Pairs of each row that shards still keep, out of sight.
        codings: One of each shard: another object once the shard has coded anew what it had.
    """

    versions: tuple[Version, ...]
    rows: tuple[Row, ...]
    dropped: tuple[int, ...]
    codings: tuple[object, ...]


class Asking:
    """What one layer held when it was asked.

    Args:
        group: The shards.
        held: What they hold.
    """

    def __init__(self, group: Group, held: Held) -> None:
        self.group, self.held = group, held
        self.holders = [shard for shard in range(group.count) if any(row.held(shard) for row in held.rows)]
        """Shards that hold pairs."""

    def numbered(self, local: Sequence[Tensor]) -> Tensor:
        """(B, G, Q, sum of K) numbers in the rows of what shards have numbered themselves, side by side."""
        return torch.cat(
            [
                torch.stack([row.numbers(shard, part[place]) for place, row in enumerate(self.held.rows)])
                for shard, part in zip(self.holders, local, strict=True)
            ],
            dim=-1,
        )

    def attended(self, sent: Packed, scoring: Scoring, k: int | None, value_dim: int) -> Attended:
        """Attention to the ``k`` best pairs, None for all; see ``attention``."""
        holders, group, held = self.holders, self.group, self.held
        how = (scoring.scale, scoring.softcap)
        if k is None:
            calls = [group.ask(shard, "attend_all", held.versions[shard].number, sent, *how) for shard in holders]
            return Attended(*joined(self._parts(calls)))
        queries = sent.data.shape[0] * sent.data.shape[1] * sent.data.shape[2]
        if queries * k * value_dim * 4 <= ONE_CALL_BYTES:
            return self._with_values(sent, scoring, k)
        tickets = [group.number() for _ in holders]
        found = group.answers(
            [
                group.ask(shard, "nearest", held.versions[shard].number, sent, k, ticket, scoring.weights)
                for shard, ticket in zip(holders, tickets, strict=True)
            ]
        )
        counts, best, places = winners([unpack(one[0]) for one in found], k)
        calls = [
            group.ask(shard, "attend", ticket, pack(count.to(torch.int32)), *how)
            for shard, ticket, count in zip(holders, tickets, counts, strict=True)
            if bool(count.any())
        ]
        out, lse = joined(self._parts(calls))
        return self._weighed([one[1] for one in found], Attended(out, lse), best, places, scoring)

    def _with_values(self, sent: Packed, scoring: Scoring, k: int) -> Attended:
        """In one call, for few queries: the values travel, and attention is computed here."""
        found = self.group.answers(
            [
                self.group.ask(shard, "nearest_values", self.held.versions[shard].number, sent, k, scoring.weights)
                for shard in self.holders
            ]
        )
        _, best, places = winners([unpack(one[0]) for one in found], k)
        values = torch.cat([unpack(one[1]) for one in found], dim=-2)
        values = values.gather(-2, places[..., None].expand(*places.shape, values.shape[-1]))
        scores = capped(best, scoring.scale, scoring.softcap).masked_fill(best == -torch.inf, -torch.inf)
        attended = Attended(*attend_scored(scores, values))
        return self._weighed([one[2] for one in found], attended, best, places, scoring)

    def _weighed(
        self,
        local: Sequence[Packed | None],
        attended: Attended,
        best: Tensor,
        places: Tensor,
        scoring: Scoring,
    ) -> Attended:
        """With numbers and scores of the pairs, where they are wanted."""
        if not scoring.weights:
            return attended
        none = best == -torch.inf
        numbered = self.numbered([unpack(one) for one in local if one is not None])
        scores = capped(best, scoring.scale, scoring.softcap).masked_fill(none, -torch.inf)
        return replace(attended, rows=numbered.gather(-1, places).masked_fill(none, -1), scores=scores)

    def _parts(self, calls: Sequence[Any]) -> list[Part]:
        return [(unpack(out), unpack(lse)) for out, lse in self.group.answers(calls)]
