"""Sections c and e: every index on every head, recall beside speed, against our own exact search."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from support.heads import Head, Truth
from support.report import Row, table
from support.subjects import Bench, micros, one_by_one, rows_of, singly, whole
from support.timing import GIB, fits, interleave, ratio

from lightning_fot.bench import DEFAULT_QUERY_GRIDS
from lightning_fot.retrievers import Retriever

Setting = dict[str, Any]

_COLUMNS = {
    "head": "head",
    "retriever": "retriever",
    "setting": "setting",
    "recall": "recall",
    "mass_recall": "mass recall",
    "mass": "mass",
    "us": "µs/query",
    "ratio": "× exact",
    "ratio_q1": "q1",
    "ratio_q3": "q3",
    "single_us": "µs at batch 1",
    "single_ratio": "× exact",
    "build_s": "build s",
    "mib": "MiB",
    "fallbacks": "fall-backs",
}


def measure_indexes(bench: Bench, section: str, heads: list[Head]) -> None:
    """Rows of each head, retriever and query setting; the first row of a head is exact search.

    Args:
        bench: Settings and report.
        section: ``c`` or ``e``.
        heads: With the keys to be searched.
    """
    rows: list[Row] = []
    asked = bench.asked
    for head in heads:
        bench.report.progress(f"{section}: {head.says()}")
        # Keys, a retriever's copy of them, its index with a third, and room for building.
        need = 6 * head.keys.nbytes
        if not fits(need):
            bench.report.progress(f"{section}: needs about {need / GIB:.0f} GiB, which are not free: left out")
            continue
        found = _of_head(bench, section, head)
        bench.report.add(section, found)
        rows += found
    table(
        f"{section}. Every index at batch {asked.batch} beside exact search, k={asked.k}; {len(heads[0].keys):,} keys",
        _COLUMNS,
        rows,
    )
    for line in _best(rows):
        print(f"  {line}")
    print(flush=True)


def _of_head(bench: Bench, section: str, head: Head) -> list[Row]:
    asked, truth = bench.asked, Truth(head, bench.asked.k)
    exact = bench.filled("exact", head)
    rows: list[Row] = []
    for name in ("exact", *asked.retrievers):
        bench.report.progress(f"{section}: {head.name}, {name}")
        began = perf_counter()
        retriever = exact if name == "exact" else bench.filled(name, head)
        build = perf_counter() - began
        given: list[Setting] = [{}, *(setting for setting in DEFAULT_QUERY_GRIDS.get(name, []) if setting)]
        usual = {argument: getattr(retriever, argument) for argument in retriever.query_args}
        settings = [{**usual, **setting} for setting in (given[:2] if asked.quick else given)]
        speeds = _speeds(bench, head, retriever, exact, settings)
        for setting, chosen, speed in zip(given, settings, speeds, strict=False):
            retriever.set_query_args(**chosen)
            rows.append(
                {
                    "head": head.name,
                    "tokens": len(head.keys),
                    "recorded": head.recorded,
                    "retriever": name,
                    "setting": " ".join(f"{key}={value}" for key, value in setting.items()) or "default",
                    "args": chosen,
                    **truth.judge(rows_of(retriever, head, asked.k, asked.batch)),
                    **speed,
                    "build_s": None if name == "exact" else build,
                    "bytes": retriever.nbytes,
                    "mib": retriever.nbytes / (1 << 20),
                    "fallbacks": retriever.stats().fallbacks,
                }
            )
    return rows


def _speeds(bench: Bench, head: Head, retriever: Retriever, exact: Retriever, settings: list[Setting]) -> list[Row]:
    """Times of each setting; exact search and all settings take turns, at either batch."""
    asked, queries = bench.asked, head.batch(bench.asked.batch)
    parts = one_by_one(queries)

    def turns(method: Callable[[Retriever], Callable[[], float]]) -> dict[str, list[float]]:
        def at(setting: Setting) -> Callable[[], float]:
            def measure() -> float:
                retriever.set_query_args(**setting)
                return method(retriever)()

            return measure

        rivals = {str(number): at(setting) for number, setting in enumerate(settings)}
        return interleave({"exact": method(exact), **rivals}, asked.repeats)

    together = turns(lambda searched: whole(searched, queries, asked.k))
    alone = turns(lambda searched: singly(lambda query: searched.search(query, asked.k), parts))
    return [
        {
            "us": micros(together[number], asked.batch),
            **ratio(together, "exact", number).as_dict("ratio"),
            "single_us": micros(alone[number]),
            **ratio(alone, "exact", number).as_dict("single_ratio"),
        }
        for number in map(str, range(len(settings)))
    ]


def _best(rows: list[Row]) -> list[str]:
    """For each index and level of recall: on how many heads it is reached, and how fast by the best setting of each."""
    lines = []
    for name in dict.fromkeys(row["retriever"] for row in rows if row["retriever"] != "exact"):
        own = [row for row in rows if row["retriever"] == name]
        heads = list(dict.fromkeys(row["head"] for row in own))
        for least in (0.85, 0.90, 0.95):
            fastest = [
                max((row["ratio"] for row in own if row["head"] == head and row["recall"] >= least), default=0.0)
                for head in heads
            ]
            reached = [value for value in fastest if value]
            text = f"reached on {len(reached)} of {len(heads)} heads"
            if reached:
                text += f", at {min(reached):.3g} to {max(reached):.3g} times the speed of exact search"
            lines.append(f"{name}, recall of at least {least:.2f}: {text}")
    return lines
