"""The benchmark of shards runs whole, and prints ratios that are numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_ratio_is_a_number(tmp_path):
    pytest.importorskip("ray")
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "sharded.py"), "--tiny", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text(encoding="utf-8"))
    places = {(row["queries"], row["where"], row["calls"]) for row in rows["searches"]}
    assert {(number, "2 shards", calls) for number in (1, 8) for calls in ("values travel", "two calls")} <= places
    for row in [*rows["searches"], *rows["reading"]]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert row["ratio"] > 0
    # Without values what travels is queries, scores and partial attention.
    sent = {(row["calls"], row["queries"]): row["bytes"] for row in rows["searches"] if row["where"] == "2 shards"}
    assert sent["two calls", 8] < sent["values travel", 8] / 4
