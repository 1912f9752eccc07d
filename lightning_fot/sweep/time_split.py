"""What the time of a sweep's cells divides into: of its runs what they recorded, of its indexes what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_fot.report.content.sweep_findings import ENOUGH

Row = Mapping[str, Any]


def index_split(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Search, insertion and building of an index, a row for exact search and one a retriever, as in ``time_split``.

    Of the largest memory, the first k and the largest batch: a call of so many queries, and its share of adding and
    indexing the keys, as if as many keys came as queries. Of a retriever's settings the fastest counts that finds 95 %
    of the best keys, or else the one that finds most; layers are averaged.

    Args:
        rows: Measured cells.
    """
    if not rows:
        return []
    size, batch, k = max(row["memory_tokens"] for row in rows), max(row["batch"] for row in rows), rows[0]["k"]
    here = [row for row in rows if (row["memory_tokens"], row["batch"], row["k"]) == (size, batch, k)]
    settings: dict[tuple[str, str], list[Row]] = {}
    for row in here:
        name = json.dumps([row.get("build"), row.get("query")], sort_keys=True)
        settings.setdefault((str(row["retriever"]), name), []).append(row)
    most = max((len(group) for group in settings.values()), default=0)
    best: dict[str, tuple[tuple[float, float], list[Row]]] = {}
    for (retriever, _), group in settings.items():
        if len(group) < most:
            # Not measured on every layer: not comparable.
            continue
        recall, seconds = _mean(group, "recall"), _mean(group, "search_ms_p50") / 1e3
        rank = (-min(recall, ENOUGH), seconds)
        if retriever not in best or rank < best[retriever][0]:
            best[retriever] = (rank, group)
    found = []
    for group in (group for _, group in best.values()):
        search = _mean(group, "search_ms_p50") / 1e3
        insert, build = (_mean(group, field) * batch / size for field in ("add_s", "build_s"))
        found.append(
            {
                "step": "searching",
                "task": "index",
                "memory": _label(group[0]),
                "context_tokens": size,
                "tokens": batch,
                "seconds": search + insert + build,
                "model_s": 0.0,
                "search_s": search,
                "insert_s": insert,
                "build_s": build,
                "beside_s": 0.0,
            }
        )
    return found


def named_split(name: str, results: Row) -> list[dict[str, Any]]:
    """Rows of ``time_split`` of one of several results, its name before that of the memory."""
    return [{**row, "memory": f"{name}: {row['memory']}"} for row in results.get("time_split") or [] if "memory" in row]


def _mean(rows: Iterable[Row], field: str) -> float:
    values = [float(row[field]) for row in rows]
    return sum(values) / len(values)


def _label(row: Row) -> str:
    words = [f"{key}={value}" for key, value in (row.get("query") or {}).items()]
    return " ".join(word for word in (str(row["retriever"]), str(row.get("build") or ""), *words) if word)
