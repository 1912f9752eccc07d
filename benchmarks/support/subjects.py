"""What the retrievers' benchmark was asked for, and how it makes and times a retriever."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from support.heads import Head
from support.report import Report
from support.timing import timed
from torch import Tensor

from lightning_fot.retrievers import Retriever, create_retriever

SINGLES = 48  # queries asked one by one in a round


@dataclass(frozen=True)
class Asked:
    """Settings of a run, as they are printed and kept."""

    keys: Path
    sections: tuple[str, ...]
    heads: tuple[str, ...]
    retrievers: tuple[str, ...]
    tokens: int | None
    large: int
    insert: int
    k: int
    batch: int
    repeats: int
    threads: int
    noise: float
    quick: bool

    def as_row(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {**asdict(self), "keys": self.keys.name}


@dataclass(frozen=True)
class Bench:
    """Settings, heads (with as many keys as sections a to d search) and the report."""

    asked: Asked
    heads: list[Head]
    report: Report

    def make(self, name: Any, head: Head, **arguments: Any) -> Retriever:
        """An empty retriever of one bank that has seen the head's past queries.

        Args:
            name: Of the retriever, or its class.
            head: Few keys are indexed too, though they would be scanned: the index is what is measured.
            **arguments: Of the retriever.
        """
        retriever = create_retriever({"name": name, **arguments}, dim=head.keys.shape[1])
        if retriever.min_index_size > len(head.keys):
            retriever = create_retriever({"name": name, **arguments, "min_index_size": 1}, dim=head.keys.shape[1])
        if head.past is not None:
            retriever.observe(head.past[None])
        return retriever

    def filled(self, name: Any, head: Head, **arguments: Any) -> Retriever:
        """A retriever whose index holds all keys of the head."""
        retriever = self.make(name, head, **arguments)
        retriever.add(head.keys[None])
        retriever.flush()
        return retriever


def arguments_of(name: str, tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """Build and query arguments that a built-in index is compared with its bare library at.

    Written out, so that both sides have the same whatever the defaults are.
    """
    if name == "hnsw":
        return {"M": 16, "ef_construction": 200}, {"ef_search": 128}
    if name == "faiss_ivf":
        cells = max(4, 2 ** round(math.log2(3 * math.sqrt(tokens))))
        cells = min(cells, tokens // 39)
        return {"nlist": cells}, {"nprobe": max(1, cells // 16)}
    leaves = max(4, 2 ** round(math.log2(1.5 * math.sqrt(tokens))))
    return {"num_leaves": leaves}, {"num_leaves_to_search": max(2, leaves // 8), "reorder": 256}


def whole(retriever: Retriever, queries: Tensor, k: int) -> Callable[[], float]:
    """A method for ``interleave``: seconds of one call with all queries (1, q, D)."""
    return timed(lambda: retriever.search(queries, k))


def singly(call: Callable[[Any], object], queries: Sequence[Any]) -> Callable[[], float]:
    """A method for ``interleave``: median seconds of calls with one query each."""

    def measure() -> float:
        return statistics.median(timed(lambda query=query: call(query))() for query in queries)

    return measure


def one_by_one(queries: Tensor) -> list[Tensor]:
    """Queries (1, q, D) as ``SINGLES`` calls of (1, 1, D)."""
    return [queries[:, number : number + 1].contiguous() for number in range(min(SINGLES, queries.shape[1]))]


def micros(seconds: Sequence[float], queries: int = 1) -> float:
    """Median microseconds a query."""
    return 1e6 * statistics.median(seconds) / queries


def rows_of(retriever: Retriever, head: Head, k: int, batch: int) -> Tensor:
    """Rows (Q, k) found for all queries of a head, in calls of ``batch``."""
    return torch.cat([retriever.search(part[None], k)[0] for part in torch.split(head.queries, batch)])
