"""The benchmark of crossbatch training runs whole on a tiny model, and its ratios are numbers."""

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
SCRIPT = ROOT / "benchmarks" / "crossbatch.py"


@pytest.mark.slow
def test_quick_run_measures_every_section(tmp_path):
    file = tmp_path / "rows.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads(file.read_text(encoding="utf-8"))["sections"]
    for section, fields in {
        "a": ["over_plain", "share", "over_share", "rows_gain", "batch_gain"],
        "b": ["plain_mib", "shared_mib", "of_rows"],
        "c": ["over_plain", "share", "over_share", "rows_gain"],
        "d": ["plain_mib", "shared_mib"],
    }.items():
        assert f"\n{section}. " in done.stdout
        for row in kept[section]["rows"]:
            for field in fields:
                assert math.isfinite(row[field])
    # Window 64: d windows of 64 keys beside (64 + 1) / 2 local ones.
    assert [row["share"] for row in kept["a"]["rows"]] == pytest.approx([1 + 64 / 32.5, 1 + 4 * 64 / 32.5])
    # What torch allocates does not depend on how busy the machine is: four windows are not copied for eight rows.
    assert kept["b"]["rows"][-1]["of_rows"] < 0.6


@pytest.mark.parametrize(("arguments", "named"), [(["--sections", "e"], "--sections"), (["--heads", "4"], "--heads")])
def test_wrong_arguments_are_refused(arguments, named, monkeypatch, capsys):
    assert named in refused(SCRIPT, arguments, monkeypatch, capsys)
