from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_results import FULL


@pytest.fixture
def results() -> dict[str, Any]:
    """Results of a run as they could be, fit to be changed by a test."""
    return copy.deepcopy(FULL)


@pytest.fixture
def run_dir(tmp_path: Path, results: dict[str, Any]) -> Path:
    """A run folder with results, losses and settings."""
    folder = tmp_path / "hnsw-run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "config.yaml").write_text("model:\n  backbone: smollm2-135m  # <i>mine</i>\n", encoding="utf-8")
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss", "val/ppl"])
        for step in range(60):
            wiggle = ((step * 7919) % 13 + (step * 104729) % 17 - 14) / 120
            writer.writerow([0, step, 1.74 + 0.18 * 0.93**step + wiggle, ""])
    return folder
