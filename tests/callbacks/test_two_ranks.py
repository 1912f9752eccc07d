"""On two processes each measures its own text, and the first one's figures are logged."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_each_rank_measures_its_own_text_and_the_first_is_logged(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "support" / "two_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((tmp_path / f"rows{rank}.json").read_text()) for rank in (0, 1)]
    assert [row["mass"] for row in rows[0]] != [row["mass"] for row in rows[1]]
    (table,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    shown = json.loads((tmp_path / "report" / "results.json").read_text())["retrieval_in_run"]
    assert [row["mass"] for row in shown] == [row["mass"] for row in rows[0]]
    with table.open(encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    masses = [float(row["retrieval/mass"]) for row in logged if row["retrieval/mass"]]
    assert masses[-1] == pytest.approx(sum(row["mass"] for row in rows[0]) / 2, rel=1e-5)
    steps = [row["step"] for row in logged if row["train/retrieval/mass"]]
    assert len(steps) == len(set(steps)) == 3
