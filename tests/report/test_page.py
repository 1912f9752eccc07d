from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from lightning_fot.report import write_report
from lightning_fot.report.page import page
from tests.support.page_reader import Reader


@pytest.fixture
def source(results: dict[str, Any], run_dir: Path) -> str:
    return page(results, run_dir)


def test_loads_nothing_from_elsewhere(source: str) -> None:
    reader = Reader(source)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        for name in ("src", "href", "data", "action", "xlink:href"):
            assert not (attributes.get(name) or "data:").startswith(("http:", "https:", "//", "file:"))
    assert "@import" not in source
    assert not re.search(r"url\(", source)
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_text_from_outside_cannot_become_markup(results: dict[str, Any], run_dir: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    results["command"] = attack
    results["perplexity"][3]["memory"] = attack
    results["tasks"][0]["task"] = attack
    results["retrieval"][0] |= {"layer": attack, "retriever": attack, "args": {attack: attack}}
    results["config"]["model"]["backbone"] = attack
    results["seconds"] = {attack: 1.0}
    (run_dir / "metrics.csv").write_text(f'step,"loss{attack.replace(chr(34), "")}"\n0,1.0\n1,0.9\n', encoding="utf-8")
    reader = Reader(page(results, run_dir))
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any(tag == "img" for tag, _ in reader.tags)
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "alert(1)" in reader.words


def test_settings_are_shown_as_text(source: str, results: dict[str, Any], run_dir: Path) -> None:
    assert "# <i>mine</i>" in Reader(source).words
    (run_dir / "config.yaml").unlink()
    assert "<script>alert('path')</script>" in Reader(page(results, run_dir)).words


def test_the_command_that_does_it_again_is_that_of_its_kind(results: dict[str, Any], run_dir: Path) -> None:
    results = {name: value for name, value in results.items() if name != "command"}
    (run_dir / "config.yaml").write_text("seed_everything: 7\n")
    commands = [
        re.findall("lightning (run|sweep) --config config.yaml", page({**results, **more}, run_dir))
        for more in ({}, {"sweep": {"runs": [{"d": 1}]}, "title": "x"})
    ]
    assert commands == [["run"], ["sweep"]]


def test_numbers_are_those_of_the_results(source: str, results: dict[str, Any]) -> None:
    reader = Reader(source)
    by_name = {row[0]: row for row in reader.rows if len(row) == 4}
    assert by_name["no memory"][3] == "6.91 ± 0.21"
    assert by_name["hnsw"][1:] == ["6.70 ± 0.21", "6.52 ± 0.20", "6.45 ± 0.20"]
    assert ["hnsw", "67% (4/6)", "33% (2/6)"] in reader.rows
    shown = [row for row in reader.rows if row[:3] == ["10", "hnsw", "ef_search=128"]]
    assert shown[0][3:9] == ["98.9%", "99.3%", "61.6%", "423", "473", "10,900"]
    assert "6.91 → 6.45" in reader.words
    assert "6.7% lower" in reader.words
    assert "2 of 6" in reader.words


def test_full_table_can_be_sorted_and_downloaded(source: str, results: dict[str, Any]) -> None:
    reader = Reader(source)
    assert any(tag == "table" and attributes.get("class") == "sortable" for tag, attributes in reader.tags)
    link = next(attributes for _, attributes in reader.tags if attributes.get("download") == "retrieval.csv")
    kind, data = (link["href"] or "").split(",", 1)
    assert kind == "data:text/csv;charset=utf-8"
    records = list(csv.DictReader(io.StringIO(unquote(data))))
    measured = [*results["retrieval"], *results["exact"]]
    assert [float(record["recall"]) for record in records] == [row["recall"] for row in measured]
    assert [float(record["queries/s"]) for record in records] == [row["qps"] for row in measured]
    assert records[0]["setting"] == "M=16, ef_search=16"
    headings = [attributes for tag, attributes in reader.tags if tag == "button" and attributes.get("id") != "theme"]
    assert len(headings) == len(records[0]) - 2  # size and k, the same in all rows, are told above the table


def test_every_point_is_drawn_for_phone_and_desktop(source: str, results: dict[str, Any]) -> None:
    marks = [a["data-tip"] or "" for _, a in Reader(source).tags if "data-tip" in a]
    points = [mark for mark in marks if "queries/s" in mark]
    measured = len(results["retrieval"]) + len(results["exact"])
    assert len(points) == 4 * measured  # two forms, on recall and on mass recall
    assert sum("ef_search=64, layer 20: recall 92.8%, mass recall 95.7%" in mark for mark in points) == 4


def test_ids_are_unique(source: str) -> None:
    ids = [attributes["id"] for _, attributes in Reader(source).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("part", ["perplexity", "tasks", "retrieval", "exact", "training", "config", "environment"])
@pytest.mark.parametrize("broken", [None, [], {}, "text", [{}], [{"layer": 1}, 3], {"steps": float("nan")}])
def test_missing_or_odd_parts_do_not_stop_the_report(
    results: dict[str, Any], run_dir: Path, part: str, broken: object
) -> None:
    if broken is None:
        del results[part]
    else:
        results[part] = broken
    Reader(page(results, run_dir))


@pytest.mark.parametrize(
    "field", ["recall", "mass_recall", "qps", "search_ms_p50", "args", "memory_tokens", "k", "retriever", "layer"]
)
def test_rows_may_lack_a_field(results: dict[str, Any], run_dir: Path, field: str) -> None:
    for row in [*results["retrieval"], *results["exact"]]:
        del row[field]
    Reader(page(results, run_dir))


def test_empty_results_say_so(tmp_path: Path) -> None:
    assert write_report({}, tmp_path) == [tmp_path / "report.html"]
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Nothing was measured yet" in reader.words
    assert "Not measured: perplexity, passkey, retrieval, exact search." in reader.words


def test_a_stopped_run_is_marked(results: dict[str, Any], run_dir: Path) -> None:
    results |= {"complete": False, "tasks": []}
    words = Reader(page(results, run_dir)).words
    assert "stopped before its evaluation ended" in words
    assert "Not measured: passkey." in words
    results |= {"complete": True}
    assert "Not measured" not in Reader(page(results, run_dir)).words


def test_page_stays_small(source: str) -> None:
    assert len(source.encode()) < 200_000
