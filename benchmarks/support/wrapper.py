"""Section a: a retriever against the library behind it, on the same transformed keys and queries."""

from __future__ import annotations

from typing import Any, cast

import torch
from support.heads import Head, Truth
from support.raw import RAW, Overheard, as_rows
from support.report import Row, table
from support.subjects import Bench, arguments_of, micros, one_by_one, rows_of, singly, whole
from support.timing import interleave, ratio, spread, timed

from lightning_fot.retrievers import PerBankRetriever

_COLUMNS = {
    "head": "head",
    "retriever": "retriever",
    "batch": "batch",
    "us": "µs/query",
    "raw_us": "library's",
    "ratio": "ratio",
    "ratio_q1": "q1",
    "ratio_q3": "q3",
    "extra_us": "more µs",
    "recall": "recall",
    "raw_recall": "library's",
}


def measure_wrapper(bench: Bench) -> None:
    """One row for each head, library and batch."""
    rows: list[Row] = []
    for head in bench.heads:
        truth = Truth(head, bench.asked.k)
        for name in bench.asked.retrievers:
            if name in RAW:
                bench.report.progress(f"a: {head.name}, {name} and its library")
                rows += _measured(bench, head, truth, name)
    bench.report.add("a", rows)
    table(
        f"a. Retrievers against their libraries, which get transformed vectors for nothing; k={bench.asked.k}",
        _COLUMNS,
        rows,
    )
    print(
        "  Keys that a retriever sets apart and scores exactly are not in its index: the library's recall lacks them.\n"
    )


def _measured(bench: Bench, head: Head, truth: Truth, name: str) -> list[Row]:
    asked = bench.asked
    building, searching = arguments_of(name, len(head.keys))
    overheard = Overheard(name)
    retriever = cast(PerBankRetriever, bench.filled(overheard.kind, head, **building, **searching))
    # The vectors of one build: a retriever may have built twice.
    raw = RAW[name](overheard.added[-1], asked.threads, **building, **searching)
    rows = []
    for batch in (asked.batch, 1):
        queries = head.batch(batch if batch > 1 else asked.batch)
        parts = [queries] if batch > 1 else one_by_one(queries)
        overheard.asked.clear()
        for part in parts:
            retriever.search(part, asked.k)
        moved = list(overheard.asked)
        if not moved:
            raise RuntimeError(f"{name} did not ask its index: {retriever.stats()}")
        rows.append((batch, parts, moved))
    overheard.asked.clear()
    recall = truth.judge(rows_of(retriever, head, asked.k, asked.batch))["recall"]
    found = as_rows(raw.search(torch.cat([torch.from_numpy(part) for part in overheard.asked]).numpy(), asked.k, 1))
    raw_recall = truth.judge(found)["recall"]
    overheard.stop()
    result: list[Row] = []
    for batch, parts, moved in rows:
        threads = retriever.threads_for(batch)
        ours = whole(retriever, parts[0], asked.k)
        theirs = timed(lambda query=moved[0], threads=threads: raw.search(query, asked.k, threads))
        if batch == 1:
            ours = singly(lambda query: retriever.search(query, asked.k), parts)
            theirs = singly(lambda query, threads=threads: raw.search(query, asked.k, threads), moved)
        # faiss shares its number of threads with torch: what the library's turn has set is put back.
        seconds = interleave({"ours": ours, "raw": _restoring(theirs, asked.threads)}, 3 * asked.repeats)
        more = spread([1e6 * (a - b) / batch for a, b in zip(seconds["ours"], seconds["raw"], strict=True)])
        result.append(
            {
                "head": head.name,
                "retriever": name,
                "tokens": len(head.keys),
                "recorded": head.recorded,
                "args": {**building, **searching},
                "batch": batch,
                "threads": threads,
                "us": micros(seconds["ours"], batch),
                "raw_us": micros(seconds["raw"], batch),
                **ratio(seconds, "ours", "raw").as_dict("ratio"),
                **more.as_dict("extra_us"),
                "recall": recall,
                "raw_recall": raw_recall,
                "fallbacks": retriever.stats().fallbacks,
            }
        )
    return result


def _restoring(method: Any, threads: int) -> Any:
    def measure() -> float:
        seconds: float = method()
        torch.set_num_threads(threads)
        return seconds

    return measure
