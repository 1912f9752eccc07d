"""The benchmark of the server runs whole on a tiny model, with a real server and real clients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_tiny_run_compares_clients_with_one_batch(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--tiny", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text(encoding="utf-8"))["sections"]["serving"]["rows"]
    ways = ["generate", "together", "noted", "served, no passages", "served"]
    found = {(row["clients"], row["way"]): row for row in rows}
    assert sorted(found) == sorted((clients, way) for clients in (1, 3) for way in ways)
    for (clients, way), row in found.items():
        # All get the same rows, and say the same of them.
        assert row["tokens"] == found[clients, "generate"]["tokens"]
        assert row["agreed"] == f"{clients}/{clients}"
        assert row["of_generate"] > 0
        assert (row["of_one"] == 1) == (clients == 1)
        assert way in done.stdout
    assert found[1, "generate"]["of_generate"] == found[3, "generate"]["of_generate"] == 1
    assert found[1, "served"]["first_of_generate"] > 0
