"""Rows of two ranks as one crossbatch (invariant 29): losses and gradients of one process, in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import gather_rank
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_two_ranks_attend_as_one_process_does(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests" / "support" / "gather_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    gather_rank.main(tmp_path, None)
    try:
        # A rank whose rows see nothing must not keep the other waiting.
        for process in ranks:
            said = process.communicate(timeout=PATIENCE_S)[1]
            assert process.returncode == 0, said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    whole, *parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "0", "1"))
    for name, (loss, gradients) in whole.items():
        # What DDP makes of them: averages.
        torch.testing.assert_close(sum(part[name][0] for part in parts) / 2, loss, atol=0, rtol=1e-12)
        for number, gradient in enumerate(gradients):
            joined = torch.cat([part[name][1][number] for part in parts]) / 2
            torch.testing.assert_close(joined, gradient, atol=1e-12, rtol=1e-9)
