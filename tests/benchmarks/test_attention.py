"""The benchmark script runs whole on a tiny model, and every section prints ratios that are numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.benchmark_scripts import refused
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "attention.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    done = run("--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))


def numbers(rows, field):
    found = [row[field] for row in rows if field in row]
    assert found, f"no row has {field}"
    assert all(math.isfinite(value) for value in found)
    return found


@pytest.mark.slow
def test_head_says_where_it_was_measured(quick):
    printed, _ = quick
    head = "\n".join(printed.splitlines()[:3])
    for word in ("cores", "threads", "torch", "transformers", "load"):
        assert word in head


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("a", ["ratio"]),
        ("b", ["over_dynamic", "over_static", "limit"]),
        ("c", ["over_model", "over_decoder", "with_upkeep", "limit"]),
        ("d", ["over_full"]),
    ],
)
def test_every_section_prints_finite_ratios(quick, section, fields):
    printed, kept = quick
    assert f"\n{section}. " in printed
    rows = kept["sections"][section]["rows"]
    for field in fields:
        for value in numbers(rows, field):
            # On a busy machine a time over a time may be anything, and what one costs over another below nothing.
            assert math.isfinite(value), (field, value)


@pytest.mark.slow
def test_speed_comes_with_recall(quick):
    _, kept = quick
    rows = [row for row in kept["sections"]["b"]["rows"] if "search_ms" in row]
    assert {row["method"] for row in rows} == {"exact", "faiss_ivf"}
    for row in rows:
        assert row["recall"] == pytest.approx(1.0) if row["method"] == "exact" else 0.3 < row["recall"] <= 1
        assert 0 < row["mass"] <= 1 + 1e-6
        # Memories of these sizes are indexed, else the index would not be what is measured.
        assert row["indexed"] == (0 if row["method"] == "exact" else 1)


@pytest.mark.slow
def test_bytes_a_token_are_those_of_the_stored_pairs(quick):
    _, kept = quick
    rows = [row for row in kept["sections"]["d"]["rows"] if "key" in row]
    assert rows
    for row in rows:
        # 2 memory layers, 2 KV heads of 16 numbers in float32.
        assert row["key"] == row["value"] == 2 * 2 * 16 * 4


@pytest.mark.slow
def test_sections_of_an_earlier_run_stay_in_the_file(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"schema": 1, "sections": {"d": {"rows": [{"kept": 1}]}}}), encoding="utf-8")
    done = run("--quick", "--sections", "c", "--tokens", "1024", "--retrievers", "exact", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert sections["d"]["rows"] == [{"kept": 1}]
    assert {row["tokens"] for row in sections["c"]["rows"]} == {0, 1024}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sections", "e"], "--sections"),
        (["--retrievers", "exat"], "exact"),
        (["--repeats", "0"], "--repeats"),
        (["--tokens", "3"], "--tokens"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, named, monkeypatch, capsys):
    assert named in refused(SCRIPT, arguments, monkeypatch, capsys)
