"""Cells of a sweep that do what a test wants, in whichever process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fot.errors import SettingError
from lightning_fot.sweep.folder import SweepFolder


@dataclass(frozen=True)
class OneCell:
    """A cell.

    Args:
        key: Of its file, and its label.
        how: ``well``; ``wrong`` fails; ``dies`` kills its process the first time; ``long`` goes on until it is stopped.
        marks: Folder that it leaves marks in.
    """

    key: str
    how: str
    marks: Path
    cost: float = 1.0

    @property
    def label(self) -> str:
        return f"cell {self.key}"

    def is_done(self, known: Mapping[str, Any] | None) -> bool:
        return bool((known or {}).get("rows"))

    def do(self, folder: SweepFolder, check: Callable[[], None]) -> None:
        begun = self.marks / f"{self.key}.begun"
        first = not begun.exists()
        with begun.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.how == "wrong":
            raise SettingError("cell", self.key, "cannot work", "Take another.")
        if self.how == "dies" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while self.how == "long":
                check()
                time.sleep(0.05)
        except KeyboardInterrupt:
            (self.marks / f"{self.key}.saved").touch()
            raise
        folder.write(self.key, {"rows": [{"key": self.key}]})
