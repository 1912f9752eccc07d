"""Markdown of the repository: lines that an editor shows whole."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120


def _pages() -> list[Path]:
    """Markdown that is committed or about to be; all of it where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*.md") if not any(part[0] == "." for part in path.relative_to(ROOT).parts)]


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of prose that are too long: code, tables and single words (addresses) may be longer."""
    found, fence = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence and len(line) > LIMIT and not line.startswith("|") and len(line.split()) > 1:
            found.append(number)
    return found


@pytest.mark.parametrize("path", _pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_lines_of_at_most_120_characters(path: Path) -> None:
    assert long_lines(path.read_text(encoding="utf-8")) == []


def test_what_counts_as_prose() -> None:
    long = "word " * 30
    code, table, address = f"```sh\n{long}\n```", f"| {long} |", f"<https://example.org/{'x' * 120}>"
    assert long_lines("\n".join([code, table, address])) == []
    assert long_lines("\n".join([code, long, "", f"- {long}"])) == [4, 6]
    assert {"README.md", "CHANGELOG.md", "docs/LOG.md"} <= {str(path.relative_to(ROOT)) for path in _pages()}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
