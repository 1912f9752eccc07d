"""The benchmark of moving windows runs whole on a tiny model, and counts the strides that there are."""

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
def test_quick_run_writes_figure_and_numbers(tmp_path):
    figure = tmp_path / "strides.png"
    command = [sys.executable, str(ROOT / "benchmarks" / "window_strides.py"), "--quick", "--figure", str(figure)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert figure.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(figure.with_suffix(".json").read_text(encoding="utf-8"))
    # 4 texts of 511 read-and-scored tokens, window 64: a stride frees 30, 32 or 64 tokens.
    expected = {"half a window and sinks": 4 * 15, "half a window": 4 * 14, "whole window": 4 * 7}
    assert {row["way"]: row["strides"] for row in kept["strides"]} == expected
    for way, strides in expected.items():
        rows = [row for row in kept["by_distance"] if row["way"] == way]
        assert rows[0]["strides"] == strides
        assert all(math.isfinite(row["above_full_context"]) for row in rows)
        assert way in done.stdout
    means = [row["nats_all"] - row["above_all"] for row in kept["strides"]]
    assert max(means) - min(means) < 1e-9
    assert abs(means[0] - kept["plain_nats"]) < 1e-9
