"""Read a run's results without trusting them to be complete: a run may be cut short, or add fields of its own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fot.config.retriever import retriever_label
from lightning_fot.system.digests import AlteredError, read_sealed

Row = Mapping[str, Any]
"""One measurement of ``results.json``."""

MEMORY_ORDER = ("none", "exact")
_STANDARD_ERRORS = ("standard_error", "value_standard_error", "stderr", "se")


def load_results(run_dir: Path) -> dict[str, Any]:
    """``results.json`` of a run folder.

    Raises:
        FileNotFoundError: The folder has no ``results.json``.
        ValueError: The file is not a JSON object, or was altered since it was written.
    """
    path = run_dir / "results.json"
    try:
        return read_sealed(path)
    except AlteredError as error:
        raise AlteredError(path, 'was altered since it was written; if that is meant, take "sha256" out') from error


def section(results: Row, name: str) -> dict[str, Any]:
    """A part of the results that is a mapping; empty when it is missing."""
    value = results.get(name)
    return dict(value) if isinstance(value, Mapping) else {}


def rows(results: Row, name: str) -> list[Row]:
    """A part of the results that is a list of rows; empty when it is missing."""
    value = results.get(name)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def number(row: Row, *keys: str) -> float | None:
    """The first of these fields that holds a finite number."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def standard_error(row: Row) -> float | None:
    """One standard error of the row's ``value``, in the same unit."""
    return number(row, *_STANDARD_ERRORS)


def memory_kinds(measured: Iterable[Row]) -> list[str]:
    """Memory kinds in the order none, exact, then the others as they come."""
    seen = list(dict.fromkeys(str(row.get("memory", "none")) for row in measured))
    return [kind for kind in MEMORY_ORDER if kind in seen] + [kind for kind in seen if kind not in MEMORY_ORDER]


def by_context(measured: Iterable[Row], field: str) -> dict[str, dict[int, Row]]:
    """Rows by memory kind and context length; rows without a usable ``field`` are left out."""
    listed = [row for row in measured if number(row, field) is not None and number(row, "context_tokens") is not None]
    table: dict[str, dict[int, Row]] = {kind: {} for kind in memory_kinds(listed)}
    for row in listed:
        table[str(row.get("memory", "none"))][int(row["context_tokens"])] = row
    return {kind: dict(sorted(cells.items())) for kind, cells in table.items()}


def retriever_name(results: Row) -> str:
    """Name of the configured retriever, from the settings or else from what was measured."""
    spec = retriever_spec(results)
    if any(key in spec for key in ("name", "class_path", "layers")):
        return retriever_label(spec)
    measured = [str(row.get("retriever")) for row in rows(results, "retrieval") if row.get("retriever")]
    measured += [kind for kind in memory_kinds(rows(results, "perplexity")) if kind not in MEMORY_ORDER]
    return measured[0] if measured else "exact"


def retriever_spec(results: Row) -> dict[str, Any]:
    """The configured retriever as ``{"name": ..., **arguments}``; empty when the settings do not say."""
    memory = section(section(section(results, "config"), "model"), "memory")
    spec = memory.get("retriever")
    if isinstance(spec, str):
        return {"name": spec}
    return dict(spec) if isinstance(spec, Mapping) else {}


def retriever_arguments(results: Row) -> dict[str, Any]:
    """The configured retriever's arguments, whether given flat or as ``init_args``."""
    spec = {key: value for key, value in retriever_spec(results).items() if key not in ("name", "class_path", "layers")}
    inner = spec.pop("init_args", None)
    return {**spec, **inner} if isinstance(inner, Mapping) else spec


def _of_retriever(results: Row, name: str) -> list[Row]:
    listed = rows(results, "retrieval")
    return [row for row in listed if str(row.get("retriever", name)) == name] or listed


def arguments(row: Row) -> dict[str, Any]:
    """A retrieval row's ``args``."""
    value = row.get("args")
    return dict(value) if isinstance(value, Mapping) else {}


def varying_arguments(measured: Iterable[Row]) -> list[str]:
    """Names of the arguments that differ between rows of one retriever: what a label has to tell."""
    values: dict[str, dict[str, set[str]]] = {}
    counts: dict[str, int] = {}
    for row in measured:
        kind = str(row.get("retriever"))
        counts[kind] = counts.get(kind, 0) + 1
        for key, value in arguments(row).items():
            values.setdefault(kind, {}).setdefault(key, set()).add(json.dumps(value, default=str))
    names: dict[str, None] = {}
    for settings in values.values():
        names.update(dict.fromkeys(key for key, found in settings.items() if len(found) > 1))
    return list(names)


def setting(row: Row, names: Iterable[str] | None = None) -> str:
    """A row's arguments as ``ef_search=64``; with ``names``, only these."""
    given = arguments(row)
    keep = given if names is None else [name for name in names if name in given]
    return ", ".join(f"{key}={given[key]}" for key in keep)


def exact_row(results: Row, row: Row) -> Row | None:
    """The exact measurement to compare a retrieval row with: same layer and memory, from the same run."""
    same_layer = [exact for exact in rows(results, "exact") if exact.get("layer") == row.get("layer")]
    for field in ("memory_tokens", "k", "batch"):
        same_layer = [exact for exact in same_layer if exact.get(field) == row.get(field)]
    return same_layer[0] if same_layer else None


def speed_ratio(results: Row, row: Row) -> float | None:
    """How many times as fast as exact search of the same run; below 1 is slower."""
    exact = exact_row(results, row)
    if exact is None:
        return None
    for key, inverse in (("qps", False), ("search_ms_p50", True)):
        ours, theirs = number(row, key), number(exact, key)
        if ours and theirs:
            return theirs / ours if inverse else ours / theirs
    return None


def is_exact(row: Row) -> bool:
    """Whether a retrieval row is of exact search."""
    return str(row.get("retriever", "exact")) == "exact"


def index_used(row: Row) -> bool:
    """False where the memory was too small for an index, so that the row is really exact search."""
    return row.get("index_used") is not False


def configured_rows(results: Row) -> list[Row]:
    """One retrieval row a layer: the setting that the run itself used.

    That is the row marked ``"configured": true``; else the one whose arguments agree with the settings; else, when
    the settings name none of the arguments of the grid, the middle of the grid by recall.
    """
    name = retriever_name(results)
    wanted = retriever_arguments(results)
    chosen: list[Row] = []
    measured = _of_retriever(results, name)
    for layer in dict.fromkeys(row.get("layer") for row in measured):
        here = [row for row in measured if row.get("layer") == layer]
        largest = max(number(row, "memory_tokens") or 0 for row in here)
        here = [row for row in here if (number(row, "memory_tokens") or 0) == largest]
        marked = [row for row in here if row.get("configured") is True]
        grid = varying_arguments(here)
        agreeing = [row for row in here if wanted.items() <= {**wanted, **arguments(row)}.items()]
        if marked:
            chosen.append(marked[0])
        elif agreeing and (len(agreeing) == 1 or any(key in wanted for key in grid)):
            chosen.append(agreeing[0])
        else:
            ordered = sorted(here, key=lambda row: number(row, "recall") or 0.0)
            chosen.append(ordered[len(ordered) // 2])
    return chosen


def configured_is_certain(results: Row) -> bool:
    """Whether :func:`configured_rows` is the run's own setting and not the middle of the grid."""
    name = retriever_name(results)
    wanted = retriever_arguments(results)
    measured = _of_retriever(results, name)
    if any(row.get("configured") is True for row in measured):
        return True
    grid = varying_arguments(measured)
    return not grid or all(key in wanted for key in grid)


def pareto_front(points: Iterable[tuple[float, float]]) -> set[tuple[float, float]]:
    """Points that no other point beats in both coordinates (larger is better)."""
    front: set[tuple[float, float]] = set()
    best = -math.inf
    for x, y in sorted(points, key=lambda point: (-point[0], -point[1])):
        if y > best:
            front.add((x, y))
            best = y
    return front


@dataclass(frozen=True)
class Curve:
    """A column of ``metrics.csv`` against the training step."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_metrics(run_dir: Path) -> list[Curve]:
    """Loss columns of ``metrics.csv`` (Lightning's CSVLogger); empty when there is no such file or column."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return []
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for index, record in enumerate(csv.DictReader(file)):
            step = _as_float(record.get("step"))
            for name, text in record.items():
                value = _as_float(text) if isinstance(name, str) and "loss" in name else None
                if value is not None:
                    found.setdefault(name, []).append((float(index) if step is None else step, value))
    if "train/loss_step" in found:
        # With on_step and on_epoch Lightning logs the same loss twice; the epoch mean is one lone point.
        found.pop("train/loss_epoch", None)
    return [
        Curve(name, tuple(step for step, _ in pairs), tuple(value for _, value in pairs))
        for name, pairs in ((name, sorted(pairs)) for name, pairs in found.items())
    ]


def smoothed(values: Iterable[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out: list[float] = []
    total = norm = 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def time_split(results: Row) -> dict[str, float]:
    """Seconds by what they were spent on, when the run recorded them."""
    for name in ("seconds", "time", "timing", "timings", "time_split"):
        parts = section(results, name)
        listed = {str(key): value for key in parts if (value := number(parts, key)) is not None and value > 0}
        if listed:
            return listed
    return {}


def total_seconds(results: Row) -> float | None:
    """How long the whole run took, when recorded."""
    return number(results, "seconds", "elapsed_s")


def _as_float(text: object) -> float | None:
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
