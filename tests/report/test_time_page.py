"""The time split and the machine's bounds, in the page, on the terminal, as CSV and of sweeps."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.commands.report import comparison
from lightning_fot.report import write_report
from lightning_fot.report.content import time_tables
from lightning_fot.report.page import page
from lightning_fot.sweep.time_split import index_split
from tests.support.page_reader import Reader


def test_bars_are_of_the_largest_memory_and_a_token(results: dict[str, Any]) -> None:
    reading, scoring, decoding = time_tables.groups(results)
    assert reading.title == "Reading into the memory: 8,192 tokens (perplexity)"
    assert [bar.name for bar in reading.bars] == ["exact search", "hnsw"]
    assert reading.bars[1].parts == pytest.approx(
        {"model": 0.5, "search": 0.125, "insert": 0.1 / 16.384, "build": 4 / 16.384}
    )
    assert reading.bars[1].total == pytest.approx(sum(reading.bars[1].parts.values()))
    assert reading.bars[1].beside == pytest.approx(0.1)
    assert [bar.name for bar in scoring.bars] == ["no memory", "exact search", "hnsw"]
    assert list(scoring.bars[0].parts) == ["model"]
    assert decoding.title == "Writing token by token beside the memory of 8,192 tokens"


def test_the_page_draws_them_to_scale_and_shows_the_numbers(results: dict[str, Any], run_dir: Path) -> None:
    source = page(results, run_dir)
    reader = Reader(source)
    widths = [float(found) for found in re.findall(r'class="split" style="width: ([\d.]+)%"', source)]
    rows = [(bar, group) for group in time_tables.groups(results) for bar in group.bars]
    assert len(widths) == len(rows) == 6
    for width, (bar, group) in zip(widths, rows, strict=True):
        assert width == pytest.approx(100 * bar.total / max(other.total for other in group.bars), abs=0.06)
    # In a flow that wraps to any width: no bar has a size in pixels.
    assert not re.search(r'class="split" style="[^"]*px', source)
    tips = [a["data-tip"] or "" for _, a in reader.tags if "data-tip" in a]
    assert "exact search: 50.0 ms a token: model 80%, search 20%" in tips
    shown = next(
        row for row in reader.rows if row[:2] == ["Reading into the memory: 8,192 tokens (perplexity)", "hnsw"]
    )
    assert shown[2:] == ["0.88", "0.50", "0.12", "0.0061", "0.24", "0.10"]
    assert ["a token", "no memory", "38 ms", "19 ms", "bandwidth", "50%"] in reader.rows
    assert [
        "a token, 8,192 in memory",
        "exact search",
        "50 ms",
        "20 ms",
        "bandwidth",
        "40%",
    ] in reader.rows
    assert "25.0 GB/s read from memory, 90 GFLOP/s in products" in reader.words


def test_text_in_them_is_no_markup(results: dict[str, Any], run_dir: Path) -> None:
    attack = "</i><img src=x onerror=alert(1)>\"'"
    for row in [*results["time_split"], *results["decoding"]]:
        row |= {"memory": attack, "task": attack, "step": attack, "limit_by": attack}
    reader = Reader(page(results, run_dir))
    assert not any(tag == "img" for tag, _ in reader.tags)


@pytest.mark.slow
def test_the_csv_has_all_of_it_unrounded(results: dict[str, Any], run_dir: Path) -> None:
    assert run_dir / "time_split.csv" in write_report(results, run_dir)
    rows = list(csv.DictReader(io.StringIO((run_dir / "time_split.csv").read_text(encoding="utf-8"))))
    assert [float(row["search_s"]) for row in rows] == [row["search_s"] for row in results["time_split"]]
    assert [row["memory"] for row in rows] == [row["memory"] for row in results["time_split"]]


@pytest.mark.parametrize("field", ["step", "task", "memory", "tokens", "seconds", "search_s", "context_tokens"])
def test_rows_may_lack_a_field(results: dict[str, Any], run_dir: Path, field: str) -> None:
    for row in results["time_split"]:
        del row[field]
    for row in results["decoding"]:
        row.pop("memory"), row.pop("limit_by")
    Reader(page(results, run_dir))


@pytest.mark.parametrize("broken", [None, {}, "text", [{}], [3], [{"tokens": float("nan"), "seconds": 1}]])
def test_odd_parts_do_not_stop_the_report(results: dict[str, Any], run_dir: Path, broken: Any) -> None:
    Reader(page(results | {"time_split": broken, "decoding": broken}, run_dir))


def test_runs_are_compared(results: dict[str, Any]) -> None:
    compared = comparison({"a": results, "b": {**results, "time_split": None}})
    assert [row["memory"] for row in compared["time_split"]] == [f"a: {row['memory']}" for row in results["time_split"]]
    (reading, *_) = [group for group in time_tables.groups(compared) if group.title.startswith("Reading")]
    assert {bar.name for bar in reading.bars} == {"a: hnsw", "a: exact"}
    assert any(bar.name == "a: none" for group in time_tables.groups(compared) for bar in group.bars)


def test_a_sweeps_indexes_cost_search_insertion_and_building() -> None:
    def cell(retriever: str, layer: int, recall: float, ms: float, **query: int) -> dict[str, Any]:
        return {"retriever": retriever, "build": "", "query": query, "layer": layer, "k": 8, "batch": 100,
                "memory_tokens": 1000, "recall": recall, "search_ms_p50": ms, "add_s": 0.5, "build_s": 2.0}  # fmt: skip

    cells = [
        cell("exact", 1, 1.0, 10), cell("exact", 2, 1.0, 30),
        cell("hnsw", 1, 0.9, 1, ef=8), cell("hnsw", 2, 0.9, 1, ef=8),  # finds too little
        cell("hnsw", 1, 0.97, 4, ef=16), cell("hnsw", 2, 0.97, 6, ef=16),
        cell("hnsw", 1, 0.99, 7, ef=32), cell("hnsw", 2, 0.99, 7, ef=32),  # finds more than enough
        cell("hnsw", 1, 0.99, 1, ef=64),  # not measured on layer 2
        {**cell("exact", 1, 1.0, 1), "batch": 1}, {**cell("exact", 1, 1.0, 1), "memory_tokens": 10},
    ]  # fmt: skip
    rows = index_split(cells)
    assert [(row["memory"], row["search_s"], row["tokens"]) for row in rows] == [
        ("exact", pytest.approx(0.02), 100), ("hnsw ef=16", pytest.approx(0.005), 100),
    ]  # fmt: skip
    # A hundred of a thousand keys.
    assert (rows[1]["insert_s"], rows[1]["build_s"]) == (pytest.approx(0.05), pytest.approx(0.2))
    assert rows[1]["seconds"] == pytest.approx(0.255)
    (group,) = time_tables.groups({"time_split": rows})
    assert group.title == "Searching an index: 100 queries at once, 1,000 keys a head"
    assert index_split([]) == []
