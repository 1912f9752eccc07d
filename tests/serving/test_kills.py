"""Servers that are killed at any moment of their work on the disk: nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

import pytest

from lightning_fot.library.library import Library
from tests.support.memories import contents, text
from tests.support.serving import Room, Running

pytestmark = pytest.mark.slow

# Serves in one forked process after the other, each of which kills itself when it has changed so many files of the
# memory (0: never).
_DRIVER = """
import os, signal, sys
import lightning_fot.model.attach, lightning_fot.serving.server, transformers
from lightning_fot.cli import main

for moment in map(int, sys.argv[1:]):
    child = os.fork()
    if not child:
        print("serving as", os.getpid(), file=sys.stderr, flush=True)
        left = [moment]

        def strike(event, arguments):
            if event in ("os.rename", "os.remove", "open") and "memories/mine" in str(arguments[0]):
                if event != "open" or not str(arguments[1]).startswith("r"):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        os._exit(main(["serve", "memories/mine", "--port=0"]))
    print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""
MOMENTS = (3, 6, 9, 13, 19, 26, 0)
# A change, again and again until it is acknowledged.
CHANGES: list[tuple[str, str | None]] = [
    ("a.txt", text(7)),
    ("b.txt", text(8)),
    ("a.txt", text(9)),
    ("shelf/book1.txt", None),
]


def _end(driver: subprocess.Popen[str]) -> None:
    """Of a test that failed: nothing of it goes on."""
    if driver.poll() is None:
        os.killpg(driver.pid, signal.SIGKILL)


def change(running: Running, done: list[int]) -> None:
    """Makes the changes that were not acknowledged yet."""
    for number, (name, said) in enumerate(CHANGES):
        if number in done:
            continue
        status, told = running.forget("mine", name) if said is None else running.put("mine", name, said)
        # What was forgotten before that could be said is not there.
        assert status in (200, 202) or (said is None and status == 404), told
        done.append(number)
        if number:
            running.until_read("mine")
    running.until_read("mine")


def test_nothing_that_was_acknowledged_is_lost(
    room: Room, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(room.folder)
    own = room.copied(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", _DRIVER, *map(str, MOMENTS)]
    done: list[int] = []
    codes: list[int] = []
    with (
        subprocess.Popen(
            words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as driver,
        ExitStack() as last,
    ):
        last.callback(_end, driver)
        assert driver.stderr is not None
        process = 0
        for line in driver.stderr:
            if line.startswith("serving as"):
                process = int(line.split()[-1])
            elif line.startswith("ended with"):
                codes.append(int(line.split()[-1]))
            elif "http" in line:
                address = next(word.rstrip(";") for word in line.split() if word.startswith("http"))
                try:
                    change(Running(address, None), done)  # type: ignore[arg-type]
                except (OSError, HTTPException):
                    continue
                # It has survived: the end of the last one, and of one that had less to do.
                os.kill(process, signal.SIGTERM)
    assert codes[-1] == 128 + signal.SIGTERM
    assert codes.count(-signal.SIGKILL) >= 4
    assert len(done) == len(CHANGES)
    library = Library.read(own.libraries["mine"].path)
    assert {one.name: one.done for one in library.documents} == {
        "shelf/book0.txt": True, "shelf/book2.txt": True, "a.txt": True, "b.txt": True,
    }  # fmt: skip
    found = {name: ids for name, _, _, ids in contents(library.path).documents}
    for name, said in (("a.txt", text(9)), ("b.txt", text(8))):
        assert room.text(found[name]) == said
    left = json.dumps(sorted(path.name for path in (library.path / "inbox").glob("*.json")))
    assert left == "[]"
