"""The tables of a sweep: its cells, its runs, and what larger memories would cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning_fot.report.content import formats, read
from lightning_fot.report.content.cells import Cell, Table
from lightning_fot.report.content.sweep_findings import speed

_SHOWN: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("memory_tokens", "keys", formats.tokens),
    ("k", "k", formats.tokens),
    ("batch", "batch", formats.tokens),
    ("recall", "recall", formats.percent),
    ("recall_worst_head", "worst head", formats.percent),
    ("mass_recall", "mass recall", formats.percent),
    ("search_ms_p50", "ms p50", formats.significant),
    ("search_ms_p95", "ms p95", formats.significant),
    ("qps", "queries/s", formats.tokens),
    ("speed", "speed", formats.times),
    ("of_limit", "of bound", lambda value: formats.percent(value, 0)),
    ("build_s", "build", formats.brief),
    ("bytes", "bytes", formats.size),
)


def brief_tables(results: read.Row) -> list[Table]:
    """What a terminal has room for: exact search and the Pareto front at the largest size, and the runs."""
    section = read.section(results, "sweep")
    listed = read.rows(section, "cells")
    largest = max((read.number(row, "memory_tokens") or 0.0 for row in listed), default=0.0)
    found = []
    for k in dict.fromkeys(row.get("k") for row in listed):
        for batch in dict.fromkeys(row.get("batch") for row in listed):
            here = [row for row in listed if row.get("k") == k and row.get("batch") == batch]
            here = [row for row in here if read.number(row, "memory_tokens") == largest]
            shown = [row for layer in dict.fromkeys(map(_layer, here)) for row in _front(here, layer)]
            table = cells({"sweep": {"cells": shown}})
            if table is not None:
                title = f"{largest:,.0f} keys a head, {batch} queries at once, k={k}: exact search and the Pareto front"
                found.append(_narrow(table, title))
    others = (brief_costs(results), trials(results), runs(results))
    return [*found, *(table for table in others if table is not None)]


def _layer(row: read.Row) -> str:
    return f"{row['layer']} ({row['recording']})" if row.get("recording") else str(row["layer"])


def _front(listed: list[read.Row], layer: str) -> list[read.Row]:
    here = [row for row in listed if _layer(row) == layer]
    placed = [(read.number(row, "recall") or 0.0, read.number(row, "qps") or 0.0) for row in here]
    front = read.pareto_front(placed)
    kept = [row for row, place in zip(here, placed, strict=True) if place in front or read.is_exact(row)]
    return sorted(kept, key=lambda row: (not read.is_exact(row), -(read.number(row, "recall") or 0.0)))


def _narrow(table: Table, title: str) -> Table:
    kept = [
        place
        for place, heading in enumerate(table.columns)
        if heading in ("layer", "retriever", "recall", "worst head", "mass recall", "ms p50", "speed", "bytes")
    ]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return replace(table, title=title, columns=tuple(table.columns[place] for place in kept), rows=rows)


def sweep_tables(results: read.Row) -> list[Table]:
    """The tables that have rows."""
    found = [trials(results), cells(results), runs(results), costs(results)]
    return [table for table in found if table is not None]


def cells(results: read.Row) -> Table | None:
    """Every index cell, exact search first of each layer and size."""
    listed = read.rows(read.section(results, "sweep"), "cells")
    if not listed:
        return None
    exact = {_alike(row): row for row in listed if read.is_exact(row)}
    body = []
    for row in listed:
        ratio = speed(row, exact.get(_alike(row)))
        label = " ".join(part for part in (str(row["retriever"]), _arguments(row)) if part)
        name = _layer(row)
        body.append(
            (
                Cell(name, name),
                Cell(label + ("" if read.index_used(row) else " *"), label),
                *(
                    Cell(shown(value), value)
                    for key, _, shown in _SHOWN
                    for value in [ratio if key == "speed" else read.number(row, key)]
                ),
            )
        )
    note = "Speed is relative to exact search of the same layer, keys, k and batch, timed in turns with it (medians). "
    note += "Of bound: the least time that this machine allows an exact search, over the time measured; an index may "
    note += "pass 100%. Bytes are the index's."
    if not all(read.index_used(row) for row in listed):
        note += " * Too few keys for an index: searched exactly."
    columns = ("layer", "retriever", *(heading for _, heading, _ in _SHOWN))
    return Table("All cells", columns, tuple(body), words=2, note=note)


def _alike(row: read.Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("recording", "layer", "memory_tokens", "k", "batch"))


def _arguments(row: read.Row) -> str:
    query = row.get("query") if isinstance(row.get("query"), Mapping) else {}
    words = [str(row.get("build") or ""), *(f"{key}={value}" for key, value in (query or {}).items())]
    return " ".join(word for word in words if word)


def runs(results: read.Row) -> Table | None:
    """A row a run: the settings that differ, then what was measured."""
    listed = read.rows(read.section(results, "sweep"), "runs")
    if not listed:
        return None
    names = list(dict.fromkeys(name for row in listed for name in row))
    numbers = [name for name in names if any(read.number(row, name) is not None for row in listed) and "." not in name]
    words = [name for name in names if name not in numbers and name != "folder"]
    body = tuple(
        (
            *(Cell(str(row.get(name, formats.MISSING)), row.get(name)) for name in words),
            *(Cell(formats.significant(read.number(row, name), 4), read.number(row, name)) for name in numbers),
        )
        for row in listed
    )
    columns = (*(name.rpartition(".")[2] for name in words), *(name.replace("_", " ") for name in numbers))
    note = "One run a row: the numbers of another seed will differ. Perplexity is at the longest context measured."
    return Table("Runs", columns, body, words=len(words), note=note)


def trials(results: read.Row) -> Table | None:
    """The trials of a search that no other beats, and what they tried."""
    search = read.section(read.section(results, "sweep"), "search")
    listed = read.rows(search, "trials")
    best = search.get("best")
    shown = [row for row in listed if isinstance(best, list) and row.get("trial") in best]
    if not shown:
        return None
    objectives = list(read.section(search, "objectives"))
    drawn = [
        name for name in dict.fromkeys(name for row in listed for name in row) if name not in (*objectives, "trial")
    ]
    body = []
    for row in sorted(shown, key=lambda row: read.number(row, objectives[0]) or 0.0):
        words = " ".join(f"{name}={row[name]}" for name in drawn if row.get(name) is not None)
        values = [read.number(row, name) for name in objectives]
        body.append(
            (
                Cell(str(row["trial"]), row["trial"]),
                Cell(words, words),
                *(Cell(formats.significant(value, 4), value) for value in values),
            )
        )
    title = f"Search: the best of {len(listed)} trials"
    note = "No other trial is better in all of these."
    if "speed" in objectives:
        note += " Layers are averaged; speed is relative to exact search, timed in turns with it."
    return Table(title, ("trial", "settings", *objectives), tuple(body), words=2, note=note)


def costs(results: read.Row) -> Table | None:
    """The cost model: exponents, error, and time and memory at sizes that were not measured."""
    listed = read.rows(read.section(results, "sweep"), "cost_model")
    if not listed:
        return None
    body = []
    sizes = list(read.section(read.section(listed[0], "bytes"), "at"))
    for row in listed:
        search, build = (read.section(row, name) for name in ("search_ms_p50", "build_s"))
        label = f"{row.get('retriever')} {row.get('setting') or ''}".strip()
        batch = read.number(row, "batch")
        laws = [read.number(search, name) for name in ("exponent", "error", "held_out")]
        recalls = row.get("recall")
        ends = [recalls[0], recalls[-1]] if isinstance(recalls, list) and recalls else [None, None]
        cells: list[Cell] = [
            Cell(str(row.get("layer")), row.get("layer")),
            Cell(label, label),
            Cell(formats.tokens(batch), batch),
            Cell(f"{formats.percent(ends[0])} → {formats.percent(ends[1])}", ends[1]),
            Cell(formats.fixed(laws[0]), laws[0]),
            Cell(formats.times(laws[1]), laws[1]),
            Cell(formats.times(laws[2]), laws[2]),
        ]
        for at in sizes:
            far = read.number(read.section(search, "at"), at)
            memory = read.number(read.section(row, "gigabytes"), at)
            built = read.number(read.section(build, "at"), at)
            cells += [
                Cell(formats.brief(None if far is None else far / 1e3), far),
                Cell(formats.long(built), built),
                Cell(formats.size(None if memory is None else memory * 1e9), memory),
            ]
        body.append(tuple(cells))
    short = {"100000000": "100M", "1000000000": "1G"}
    heads = [f"{name}, {short.get(at, at)}" for at in sizes for name in ("search", "build", "RAM")]
    beyond = max((read.number(row, "beyond") or 0.0 for row in listed), default=None)
    note = (
        "Power laws through the sizes measured, in keys a head. Exponent, error and held out are those of a search: "
        "error is the largest factor by which a measured time lies off its line; held out is what the sizes below the "
        "largest say of it, over what was measured. Recall: at the smallest and at the largest size, with the same "
        "setting. RAM is of the index with float32 keys and values, all heads of a layer. "
        f"{_machine(results)}The nearest size shown lies {formats.significant(beyond, 2)} times beyond what was "
        "measured: a guess, and where memory would not suffice, no more than that."
    )
    columns = ("layer", "retriever", "batch", "recall", "exponent", "error", "held out", *heads)
    return Table("What more keys would cost", columns, tuple(body), words=2, note=note)


def _machine(results: read.Row) -> str:
    """On what was measured, in a sentence."""
    found = read.section(results, "environment")
    if not found.get("processor"):
        return ""
    threads = read.number(found, "threads")
    return f"Measured on {found['processor']}" + (f", {formats.tokens(threads)} threads. " if threads else ". ")


def brief_costs(results: read.Row) -> Table | None:
    """Of the cost model what a terminal has room for: the settings of the time split, one query, the largest size."""
    table = costs(results)
    if table is None:
        return None
    batches = [row[2].raw for row in table.rows]
    chosen = {str(row.get("memory")) for row in read.rows(results, "time_split") if row.get("task") == "index"}
    rows = [row for row in table.rows if row[2].raw == min(batches) and (not chosen or row[1].raw in chosen)]
    kept = [place for place, name in enumerate(table.columns) if name not in ("batch", "exponent", "error")]
    kept = [place for place in kept if not table.columns[place].endswith("100M")]
    return replace(
        table,
        title=f"{table.title}, {formats.tokens(min(batches))} queries at once",
        columns=tuple(table.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in rows),
    )
