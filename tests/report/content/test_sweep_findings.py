"""The headline numbers of a sweep."""

from __future__ import annotations

from typing import Any

from lightning_fot.report.content.sweep_findings import sweep_findings


def _cell(layer: int, ef: int | None, recall: float, qps: float, keys: int = 1000) -> dict[str, Any]:
    return {
        "layer": layer, "retriever": "exact" if ef is None else "hnsw", "build": "", "k": 8, "batch": 1,
        "query": {} if ef is None else {"ef_search": ef}, "memory_tokens": keys, "recall": recall,
        "search_ms_p50": 1e3 / qps,
    }  # fmt: skip


CELLS = [
    _cell(1, None, 1.0, 100), _cell(2, None, 1.0, 200),
    _cell(1, 16, 0.90, 900), _cell(2, 16, 0.90, 1800),  # fast, finds too little
    _cell(1, 32, 0.94, 400), _cell(2, 32, 0.98, 200),  # 96 % on average; 4 and 1 times: 2 in the geometric mean
    _cell(1, 64, 0.99, 150), _cell(2, 64, 0.99, 300),  # finds more, slower
    _cell(1, 128, 0.99, 9000),  # not measured on layer 2
    _cell(1, 32, 1.0, 9000, keys=10), _cell(2, 32, 1.0, 9000, keys=10),  # a smaller memory
]  # fmt: skip


def test_the_fastest_setting_that_finds_enough_is_named() -> None:
    (found,) = sweep_findings({"sweep": {"cells": CELLS}})
    assert found.value == "2.0× at 96.0%"
    assert found.text.startswith("hnsw ef_search=32 is the fastest")
    assert found.caveat == "1,000 keys a head, k=8; mean over the layers, 3 settings."
    assert found.verdict == "good"


def test_a_time_taken_in_turns_wins_over_one_taken_before() -> None:
    cells = [{**row, "exact_ms_p50": 3 * row["search_ms_p50"]} for row in CELLS if row["retriever"] == "hnsw"]
    (found,) = sweep_findings({"sweep": {"cells": [*CELLS[:2], *cells]}})
    assert found.value.startswith("3.0×")


def test_where_none_finds_enough_the_nearest_is_named() -> None:
    (found,) = sweep_findings({"sweep": {"cells": CELLS[:4]}})
    assert found.value == "recall 90.0% at most"
    assert found.verdict == "bad"


def test_the_best_run_is_named() -> None:
    runs = [
        {"model.crossbatch.d": d, "perplexity, none": 7.0, "perplexity, exact": value}
        for d, value in ((1, 7.5), (2, 7.25), (4, None))
    ]
    (found,) = sweep_findings({"sweep": {"runs": runs}})
    assert found.value == "7.25"
    assert "d=2" in found.text
    assert "7.50" in found.text
    assert sweep_findings({"sweep": {"cells": [], "runs": []}}) == []
    assert sweep_findings({"sweep": {"runs": [{"perplexity, exact": None}]}}) == []
