"""The headline numbers of a sweep: the fastest setting that finds enough, and the best run."""

from __future__ import annotations

import json
import math

from lightning_fot.report.content import formats, read
from lightning_fot.report.content.findings import Finding, mean

ENOUGH = 0.95


def sweep_findings(results: read.Row) -> list[Finding]:
    """A finding for each number of queries at once, at the largest memory, and one of the runs."""
    section = read.section(results, "sweep")
    cells = [row for row in read.rows(section, "cells") if read.index_used(row)]
    largest = max((read.number(row, "memory_tokens") or 0.0 for row in cells), default=0.0)
    k = next((row.get("k") for row in cells), None)
    cells = [row for row in cells if read.number(row, "memory_tokens") == largest and row.get("k") == k]
    batches = dict.fromkeys(row.get("batch") for row in cells)
    found = [_fastest([row for row in cells if row.get("batch") == batch]) for batch in batches]
    return [finding for finding in (*found, _best_run(read.rows(section, "runs"))) if finding is not None]


def _fastest(cells: list[read.Row]) -> Finding | None:
    """Of the settings that find enough in the mean over the layers, the fastest against exact search."""
    exact = {_layer(row): row for row in cells if read.is_exact(row)}
    groups: dict[str, list[read.Row]] = {}
    for row in cells:
        if not read.is_exact(row):
            name = [row.get("retriever"), row.get("build"), row.get("query")]
            groups.setdefault(json.dumps(name, sort_keys=True), []).append(row)
    rated = []
    for group in groups.values():
        found = [speed(row, exact.get(_layer(row))) for row in group]
        ratios = [math.log(ratio) for ratio in found if ratio]
        recall = mean(read.number(row, "recall") for row in group)
        # A setting that was not measured on every layer is not comparable with the others.
        if recall is not None and len(ratios) == len(exact):
            rated.append((recall, math.exp(sum(ratios) / len(ratios)), group))
    if not rated:
        return None
    first = rated[0][2][0]
    k, batch, size = (read.number(first, name) for name in ("k", "batch", "memory_tokens"))
    topic = f"{formats.tokens(batch)} {'query' if batch == 1 else 'queries'} a head at once"
    caveat = f"{formats.tokens(size)} keys a head, k={formats.tokens(k)}; mean over the layers, {len(rated)} settings."
    enough = [entry for entry in rated if entry[0] >= ENOUGH]
    if not enough:
        recall, ratio, group = max(rated, key=lambda entry: entry[0])
        text = f"No setting finds {ENOUGH:.0%} of the best keys; {_label(group[0])} comes nearest, at "
        text += f"{formats.times(ratio)} the speed of exact search."
        return Finding(topic, f"recall {formats.percent(recall)} at most", text, caveat, "bad")
    recall, ratio, group = max(enough, key=lambda entry: entry[1])
    text = f"{_label(group[0])} is the fastest that finds {ENOUGH:.0%} of the best keys or more: "
    text += f"{formats.percent(recall)} at {formats.times(ratio)} the speed of exact search."
    if ratio < 1:
        text += " Here no index pays."
    value = f"{formats.times(ratio)} at {formats.percent(recall)}"
    return Finding(topic, value, text, caveat, "good" if ratio >= 1.05 else "open" if ratio > 0.95 else "bad")


def speed(row: read.Row, exact: read.Row | None) -> float | None:
    """How many times as fast as exact search: as timed in turns with it, or else against its own row."""
    ours, theirs = read.number(row, "search_ms_p50"), read.number(row, "exact_ms_p50")
    if not theirs and exact is not None:
        theirs = read.number(exact, "search_ms_p50")
    return theirs / ours if ours and theirs else None


def _best_run(runs: list[read.Row]) -> Finding | None:
    columns = list(dict.fromkeys(name for row in runs for name in row if name.startswith("perplexity, ")))
    # Without memory a setting of the memory changes nothing.
    columns.sort(key=lambda name: name == "perplexity, none")
    measured = [(value, row) for row in runs for name in columns[:1] if (value := read.number(row, name)) is not None]
    if not measured:
        return None
    value, best = min(measured, key=lambda entry: entry[0])
    worst = max(entry[0] for entry in measured)
    settings = best.get("run") or ", ".join(f"{key.rpartition('.')[2]}={best[key]}" for key in best if "." in key)
    text = f"Lowest {columns[0]}, of {len(measured)} runs: {settings}. The highest is {formats.fixed(worst)}."
    return Finding("Runs", formats.fixed(value), text, "One seed each: small differences may be chance.", "open")


def _layer(row: read.Row) -> str:
    return json.dumps([row.get("recording"), row.get("layer")])


def _label(row: read.Row) -> str:
    query = row.get("query")
    words = [f"{key}={value}" for key, value in query.items()] if isinstance(query, dict) else []
    return " ".join(word for word in (str(row.get("retriever")), str(row.get("build") or ""), *words) if word)
