"""The benchmark of memories in all layers runs whole on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quick_run_compares_three_ways_at_each_size(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "training_free.py"), "--quick", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["pairs"] for row in rows] == [128] * 3 + [256] * 3
    for bare, *others in (rows[:3], rows[3:]):
        assert (bare["way"], bare["read, times bare"], bare["decoded, times bare"]) == ("bare backbone", 1, 1)
        for row in others:
            ratio = bare["read tokens/s"] / row["read tokens/s"]
            assert abs(row["read, times bare"] - ratio) < 0.05 * ratio
            assert row["way"] in done.stdout
