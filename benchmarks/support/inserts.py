"""Section d: what inserting a window of keys costs the caller, in ``add`` and in the searches behind it."""

from __future__ import annotations

import statistics
from time import perf_counter

from support.heads import Head
from support.report import Row, table
from support.subjects import Bench, one_by_one, singly, whole
from support.timing import timed
from torch import Tensor

from lightning_fot.retrievers import Retriever

_COLUMNS = {
    "head": "head",
    "retriever": "retriever",
    "windows": "windows",
    "add_ms": "add ms",
    "add_ms_max": "longest",
    "steady_ms": "search ms before",
    "next_ms": "search ms after",
    "next_ms_max": "longest",
    "cost_ms": "cost ms",
    "cost_ms_max": "longest",
    "single_us": "µs at batch 1 before",
    "single_us_after": "after",
    "flush_s": "flush s",
    "builds": "builds",
    "fallbacks": "fall-backs",
}


def measure_inserts(bench: Bench) -> None:
    """One row for each retriever, on the first head."""
    head, asked = bench.heads[0], bench.asked
    rows: list[Row] = []
    for name in ("exact", *asked.retrievers):
        bench.report.progress(f"d: {head.name}, windows of {asked.insert:,} keys into {name}")
        rows.append(_measured(bench, head, name))
    bench.report.add("d", rows)
    table(
        f"d. Inserting {asked.insert:,} keys at {len(head.keys):,}; searches of {asked.batch} queries, k={asked.k}",
        _COLUMNS,
        rows,
    )
    print(
        "  cost: add, and what the search behind it took longer than the one before the windows (medians and longest)\n"
    )


def _measured(bench: Bench, head: Head, name: str) -> Row:
    asked = bench.asked
    retriever, queries = bench.filled(name, head), head.batch(asked.batch)
    retriever.search(queries, asked.k)
    steady = statistics.median(whole(retriever, queries, asked.k)() for _ in range(max(3, asked.repeats)))
    single = _single(retriever, queries, asked.k)
    before = retriever.stats().rebuilds
    adds, searches = [], []
    windows = 4 if asked.quick else 12
    for number in range(windows):
        window = _window(head, number, asked.insert)
        adds.append(timed(lambda keys=window: retriever.add(keys))())
        searches.append(whole(retriever, queries, asked.k)())
    single_after = _single(retriever, queries, asked.k)
    began = perf_counter()
    retriever.flush()
    flush = perf_counter() - began
    costs = [add + search - steady for add, search in zip(adds, searches, strict=True)]
    return {
        "head": head.name,
        "tokens": len(head.keys),
        "recorded": head.recorded,
        "retriever": name,
        "windows": windows,
        "add_ms": 1e3 * statistics.median(adds),
        "add_ms_max": 1e3 * max(adds),
        "steady_ms": 1e3 * steady,
        "next_ms": 1e3 * statistics.median(searches),
        "next_ms_max": 1e3 * max(searches),
        "cost_ms": 1e3 * statistics.median(costs),
        "cost_ms_max": 1e3 * max(costs),
        "over_steady": statistics.median(searches) / steady,
        "single_us": 1e6 * single,
        "single_us_after": 1e6 * single_after,
        "flush_s": flush,
        "builds": retriever.stats().rebuilds - before,
        "fallbacks": retriever.stats().fallbacks,
    }


def _window(head: Head, number: int, size: int) -> Tensor:
    """(1, size, D) keys that the head holds already: no time measured here depends on their being new."""
    start = (number * size) % max(1, len(head.keys) - size)
    return head.keys[None, start : start + size].contiguous()


def _single(retriever: Retriever, queries: Tensor, k: int) -> float:
    return singly(lambda query: retriever.search(query, k), one_by_one(queries))()
