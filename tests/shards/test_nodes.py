"""Machines that fail, on Ray's own test cluster: nothing that was acknowledged is lost, and no answer is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S


def struck(repository: Path, folder: Path, kills: int, seed: int) -> None:
    words = [sys.executable, "-m", "tests.support.node_strikes", str(folder), str(kills), str(seed)]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=PATIENCE_S * kills)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout)
    assert (found["kills"], found["lost"], found["wrong"]) == (kills, 0, 0), done.stdout
    # Both kinds came, and each was seen.
    assert 0 < found["nodes"] < kills
    assert found["losses"] >= kills
    # Of what cannot be made again, the shard and what to do are told.
    assert "shard 1 is lost" in found["said"]
    assert "lightning ingest NAME PATH" in found["said"]


@pytest.mark.slow
def test_nodes_and_shards_that_die(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    struck(repository, tmp_path, 4, 0)


@pytest.mark.robustness_long
@pytest.mark.timeout(14400)
def test_forty_nodes_and_shards_that_die(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    struck(repository, tmp_path, 40, 1)
