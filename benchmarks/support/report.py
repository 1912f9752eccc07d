"""What the benchmark prints, and the JSON file that it keeps."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lightning_fot.system.environment import environment

Row = dict[str, Any]


class Report:
    """Prints progress and tables, and keeps the rows of each section in a file that later runs go on with.

    Args:
        file: JSON file, or None.
        settings: What was asked for.
    """

    def __init__(self, file: Path | None, settings: Row) -> None:
        self.file = file
        self.settings = settings
        self.began = time.perf_counter()
        self.content: Row = {"schema": 1, "sections": {}}
        if file is not None and file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))

    def head(self) -> None:
        """Prints where and with what the numbers are measured."""
        found = environment()
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
        print(f"{found['date']}  {found['processor']}, {found['cores']} cores, {found['threads']} threads")
        print(f"lightning-fot {found['lightning_fot']}, Python {found['python']}, {versions}")
        print("load", *(f"{load:.2f}" for load in os.getloadavg()), " settings", json.dumps(self.settings), flush=True)

    def progress(self, text: str) -> None:
        """A line that says what is being done."""
        print(f"[{time.perf_counter() - self.began:6.0f} s] {text}", flush=True)

    def start(self, section: str) -> None:
        """Begins a section anew; other sections in the file stay."""
        self.content["sections"][section] = {"environment": environment(), "settings": self.settings, "rows": []}

    def add(self, section: str, rows: list[Row]) -> None:
        """Keeps rows of a section, in the file at once."""
        entry = self.content["sections"][section]
        entry["rows"].extend(rows)
        entry["load_after"] = os.getloadavg()[0]
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_name(self.file.name + ".partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.file)


def table(title: str, columns: dict[str, str], rows: list[Row]) -> None:
    """Prints rows below a title.

    Args:
        title: What is shown.
        columns: Field of the rows -> heading.
        rows: Missing fields are shown as a dot; numbers with three digits.
    """
    cells = [list(columns.values())] + [[shown(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    print(f"\n{title}")
    for line in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join([first, *others]))
    print(flush=True)


def shown(value: Any) -> str:
    """A value in few letters."""
    if value is None:
        return "·"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
