"""Trainings of ``benchmarks/`` in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def train_twice(script: str, folder: Path, *words: str) -> Path:
    """Has a script do one step, and by the same command go on to the second; gives its folder."""
    book, out = folder / "book.txt", folder / "out"
    book.write_text("\n".join(f"On day {day} the sea was calm." for day in range(2000)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for steps in ("1", "2"):
        command = [sys.executable, f"benchmarks/{script}", str(out), "--books", str(book), "--steps", steps, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return out
