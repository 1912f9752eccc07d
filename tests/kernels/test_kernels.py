"""Triton's kernels, in its interpreter on a CPU, against torch: odd shapes, grouped heads, padding, missing rows."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides once, when it is imported, whether it interprets."""
    words = [sys.executable, str(Path(__file__).with_name("interpreted.py"))]
    done = subprocess.run(
        words, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "14 searches, 8 attentions" in done.stdout
