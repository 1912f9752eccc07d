"""How OpenMP's threads are told to wait."""

import os
import subprocess
import sys

import pytest

_SHOW = "import os; from lightning_fot.cli import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[-1] == expected
