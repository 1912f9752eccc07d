"""The recipe for Ray Train: two workers of Ray learn what two processes of Lightning learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
# What ray[train] brings.
MISSING = [name for name in ("ray", "pandas", "pyarrow", "pydantic") if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"ray[train] is not installed: {MISSING}")]

SETTINGS = ["--evaluation.passkey_samples=0", "--model.crossbatch.across_ranks=true"]
# Two workers are to fit where there is one core.
RECIPE = [str(ROOT / "examples" / "ray" / "train.py"), "2", "--cpus=0.5"]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment,
        cwd=folder,
        check=False,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def test_two_workers_learn_what_two_processes_do(tmp_path: Path) -> None:
    # Paths that are relative here are relative there.
    given = ["--config", "smoke", "--run_dir=ray", *SETTINGS]
    done = run(tmp_path, *RECIPE, *given, "--trainer.max_steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    own = ["-m", "lightning_fot", "run", "--config", "smoke", "--run_dir=plain", *SETTINGS, "--trainer.max_steps=3"]
    done = run(tmp_path, *own, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("ray", "plain")]
    rows, window = 4, 64
    for one in results:
        assert one["complete"] is True
        assert one["training"]["steps"] == 3
        assert one["training"]["tokens"] == 3 * 2 * rows * window
    mine, theirs = weights(tmp_path / "ray"), weights(tmp_path / "plain")
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-6)
    # It goes on from its own checkpoint, as runs do.
    done = run(tmp_path, *RECIPE, *given, "--trainer.max_steps=4", "--ckpt_path=last")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "ray" / "results.json").read_text())["training"]["steps"] == 4
    assert any(not torch.equal(weight, mine[name]) for name, weight in weights(tmp_path / "ray").items())


def test_what_a_worker_refuses_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, *RECIPE, "--config", "smoke", "--run_dir=out", "--model.memory.top_k=0")
    assert done.returncode != 0
    assert "top_k=0" in done.stdout + done.stderr
    assert "lightning run ended with status 2" in done.stderr


def test_a_folder_is_asked_for(tmp_path: Path) -> None:
    done = run(tmp_path, *RECIPE, "--config", "smoke")
    assert done.returncode == 2
    assert "give --run_dir=FOLDER" in done.stderr
