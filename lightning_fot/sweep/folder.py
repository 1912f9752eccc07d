"""The folder of a sweep: finished cells, and claims by which several processes share the rest.

A cell is a file named after its settings, written as a whole or not at all. Who works on one holds a claim beside it,
whose time is refreshed while the worker lives; a claim that nobody refreshes is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_fot.system.digests import read_sealed, write_sealed

STALE_S = 60.0
_BEAT_S = 5.0
_KEY = "cell"


class SweepFolder:
    """Paths and cells of a sweep.

    Args:
        path: The folder; it need not exist.
        stale_s: Seconds after which a claim that was not refreshed counts for nothing.
    """

    def __init__(self, path: Path, stale_s: float = STALE_S) -> None:
        self.path = path
        self.cells = path / "cells"
        self.recordings = path / "recordings"
        self.runs = path / "runs"
        self.config = path / "config.yaml"
        self._stale = stale_s

    def read(self, key: str) -> dict[str, Any] | None:
        """What is known of a cell; None where nothing is, or where the file was damaged, altered or another's."""
        try:
            cell = read_sealed(self.cells / f"{key}.json")
        except (OSError, ValueError):
            return None
        # Cells of earlier versions do not say whose they are.
        return cell if cell.pop(_KEY, key) == key else None

    def write(self, key: str, cell: dict[str, Any]) -> None:
        """Keeps a cell."""
        write_sealed(self.cells / f"{key}.json", {**cell, _KEY: key})

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the cell is ours for as long as the block takes; False where another process works on it."""
        self.cells.mkdir(parents=True, exist_ok=True)
        path = self.cells / f"{key}.claim"
        if not self._take(path):
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=_refresh, args=(path, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            path.unlink(missing_ok=True)

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Waits until no other process is in a block of this name."""
        while True:
            with self.claim(name) as ours:
                if ours:
                    yield
                    return
            time.sleep(0.1)

    def _take(self, path: Path) -> bool:
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        for _ in range(2):
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(owner)
                return True
            except FileExistsError:
                if not self._abandoned(path):
                    return False
                # Of several processes that see it abandoned, one renames it away and the others find nothing.
                try:
                    gone = path.with_suffix(f".{os.getpid()}.gone")
                    path.rename(gone)
                    gone.unlink()
                except FileNotFoundError:
                    pass
        return False

    def _abandoned(self, path: Path) -> bool:
        try:
            age = time.time() - path.stat().st_mtime
            owner = json.loads(path.read_text(encoding="utf-8") or "{}")
        except FileNotFoundError:
            return True
        except ValueError:
            return age > self._stale
        if age > self._stale:
            return True
        return owner.get("host") == socket.gethostname() and not _alive(owner.get("pid"))


def _refresh(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        try:
            os.utime(path)
        except OSError:
            return


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
