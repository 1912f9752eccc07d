"""A write is killed at each of its steps: the old content or the new one is there; the next write leaves no rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

# Dies at the audit event with this number: each open, mkdir, rename, chmod and removal of the file system is one.
KILLER = """
import os, signal, sys
from pathlib import Path
from lightning_fot.system.files import replacing, write_text
target, step = Path(sys.argv[1]), int(sys.argv[2])
import fcntl, shutil
left = step
EVENTS = ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock")
def at(event, words):
    global left
    if event in EVENTS:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
sys.addaudithook(at)
"""
FILE = KILLER + "write_text(target, 'new')"
FOLDER = KILLER + (
    "with replacing(target) as fresh:\n    (fresh / 'a').write_text('new')\n    (fresh / 'b').write_text('new')\n"
)


def _killed(code: str, target: Path, step: int) -> bool:
    done = subprocess.run([sys.executable, "-c", code, str(target), str(step)], check=False, capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0


def _kill_at_each_step(code: str, target: Path, check: object) -> int:
    step = 0
    while _killed(code, target, step):
        assert callable(check)
        check()
        step += 1
    return step


def test_a_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def check() -> None:
        assert target.read_text() in ("old", "new")
        target.write_text("old")

    # Made, locked, opened, synchronised, renamed, synchronised, removed.
    assert _kill_at_each_step(FILE, target, check) >= 7
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()

    def fill() -> None:
        for name in "ab":
            (target / name).write_text("old")

    def check() -> None:
        from lightning_fot.system.files import clean

        # Between two renames it may be missing; whoever cleans gives it back.
        clean(tmp_path)
        assert sorted(os.listdir(target)) == ["a", "b"]
        assert len({(target / name).read_text() for name in "ab"}) == 1
        assert os.listdir(tmp_path) == ["folder"]
        fill()

    fill()
    assert _kill_at_each_step(FOLDER, target, check) >= 10
    assert {(target / name).read_text() for name in "ab"} == {"new"}
    assert os.listdir(tmp_path) == ["folder"]


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    from lightning_fot.system.files import write_text, writing

    target = tmp_path / "file"
    with writing(target) as slow:
        slow.write_text("slow")
        write_text(target, "fast")
        assert slow.read_text() == "slow"
    assert target.read_text() == "slow"
    assert os.listdir(tmp_path) == ["file"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    from lightning_fot.system.files import writing

    def fail() -> None:
        with writing(tmp_path / "file") as fresh:
            fresh.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "with\nline", "[*]", ".hidden", "x.part"])
def test_names_of_all_kinds(tmp_path: Path, name: str) -> None:
    from lightning_fot.system.files import write_text

    for text in ("one", "two"):
        write_text(tmp_path / name, text)
        assert (tmp_path / name).read_text() == text
    assert os.listdir(tmp_path) == [name]
