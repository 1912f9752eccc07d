"""Output that nobody reads or that a terminal cannot show: the work is done all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from lightning_fot.system.output import end, make_patient

make_patient()
for number in range(2000):
    print("a line of output \\u2026 \\u00e9 \\udcff", number)
    print("a note", number, file=sys.stderr, flush=True)
open("done", "w").close()
sys.exit(3 if end() else 0)
"""


def _run(folder: Path, repository: Path, **streams: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONIOENCODING": "ascii"}
    return subprocess.Popen([sys.executable, "-c", _PROGRAM], cwd=folder, env=environment, **streams)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_goes_away_ends_no_work(tmp_path: Path, repository: Path, closed: str) -> None:
    read, write = os.pipe()
    os.close(read)
    other = "stderr" if closed == "stdout" else "stdout"
    with _run(tmp_path, repository, **{closed: write, other: subprocess.PIPE}) as child:
        os.close(write)
        said = (child.stderr if closed == "stdout" else child.stdout).read()
    assert child.returncode == 0
    assert (tmp_path / "done").exists()
    assert said.count(b"\n") == 2000
    assert b"Traceback" not in said
    assert b"Exception" not in said


def test_signs_that_an_encoding_lacks_are_written_out(tmp_path: Path, repository: Path) -> None:
    with _run(tmp_path, repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        said, _ = child.communicate()
    assert child.returncode == 0
    assert said.splitlines()[7] == rb"a line of output \u2026 \xe9 \udcff 7"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_told(tmp_path: Path, repository: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with _run(tmp_path, repository, stdout=full, stderr=subprocess.PIPE) as child:
        os.close(full)
        _, complaints = child.communicate()
    assert child.returncode != 0
    assert b"No space left" in complaints


@pytest.mark.parametrize(("words", "part"), [(["--help"], b"Usage"), (["retrievers"], b"hnsw"), (["--version"], b".")])
def test_the_program_itself_bears_both(tmp_path: Path, repository: Path, words: list[str], part: bytes) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lightning_fot", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert part in done.stdout
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
