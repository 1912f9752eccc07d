"""The retrievers of all shards, as measurements ask a single one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.stats import RetrieverStats


class ShardedRetriever:
    """Counts what this process has waited for; the rest it asks the shards.

    Args:
        kind: Of each shard's retriever.
        told: What the shards say of their slices (``Shard.told``).
        flush: Has all of them build what is pending.
    """

    def __init__(
        self, kind: type[Retriever], told: Callable[[], list[dict[str, Any]]], flush: Callable[[], None]
    ) -> None:
        self._told, self.flush = told, flush
        self.exact = kind.exact
        self.learns = kind.observe is not Retriever.observe
        """Whether past queries are of use to it."""
        self._stats = RetrieverStats()

    @property
    def indexed(self) -> Tensor:
        """(banks,) int64: keys that indexes of the shards cover."""
        return torch.tensor([told["indexed"] for told in self._told()]).sum(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the indexes."""
        return sum(told["index_bytes"] for told in self._told())

    def added(self, seconds: float) -> None:
        """Told of each append."""
        self._stats.adds += 1
        self._stats.add_seconds += seconds

    def searched(self, queries: int, seconds: float) -> None:
        """Told of each search."""
        self._stats.searches += 1
        self._stats.queries += queries
        self._stats.search_seconds += seconds

    def stats(self) -> RetrieverStats:
        """Counters: of calls and their time here; of builds, scans and fallbacks the shards' sums."""
        theirs: list[RetrieverStats] = [told["stats"] for told in self._told()]
        return replace(
            self._stats,
            build_seconds=sum(one.build_seconds for one in theirs),
            build_times=tuple(seconds for one in theirs for seconds in one.build_times),
            rows_scanned=sum(one.rows_scanned for one in theirs),
            fallbacks=sum(one.fallbacks for one in theirs),
            rebuilds=sum(one.rebuilds for one in theirs),
        )
