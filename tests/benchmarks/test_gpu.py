"""The script for a lent GPU, in small on a CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are in a checkout only")


def said(out, *words):
    return subprocess.run([sys.executable, SCRIPT, out, "--tiny", *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_is_done_is_brought_back_and_not_done_again(tmp_path):
    first = said(tmp_path, "--only", "passkey,crossbatch")
    assert first.returncode == 0, first.stdout + first.stderr
    for name in (
        "passkey/delta/delta.safetensors",
        "passkey/results.json",
        "passkey/report.html",
        "passkey/log.txt",
        "crossbatch/crossbatch.json",
    ):
        assert (tmp_path / name).stat().st_size > 0
    summary = (tmp_path / "summary.md").read_text()
    assert "| passkey | done |" in summary
    assert "passkey 512 exact" in summary
    assert said(tmp_path, "--only", "passkey").stdout.startswith("| passkey | done before | 0.0 | passkey 512")


@pytest.mark.slow
def test_exact_search_on_a_device_is_measured(tmp_path):
    first = said(tmp_path, "--only", "scan,kernels")
    assert first.returncode == 0, first.stdout + (tmp_path / "scan" / "log.txt").read_text()
    rows = json.loads((tmp_path / "scan" / "scan.json").read_text())["rows"]
    assert {row["way"] for row in rows} == {"torch", "ours"}
    assert {row["queries"] for row in rows} == {1, 8}
    kernels = "done" if importlib.util.find_spec("triton") else "left out: triton is not installed"
    assert f"| kernels | {kernels} |" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_a_step_without_time_is_stopped_and_named(tmp_path):
    stopped = said(tmp_path, "--only", "passkey", "--minutes", "0.05")
    assert "| passkey | out of time" in stopped.stdout
    assert not (tmp_path / "passkey" / "done").exists()


@pytest.mark.slow
def test_a_failure_is_named_and_the_next_step_done(tmp_path):
    (tmp_path / "passkey").mkdir()
    (tmp_path / "passkey" / "run").write_text("in the way")
    result = said(tmp_path, "--only", "crossbatch,passkey")
    assert result.returncode == 1
    assert "| crossbatch | done |" in result.stdout
    assert "| passkey | failed with" in result.stdout
    assert said(tmp_path, "--only", "nothing").returncode == 2
