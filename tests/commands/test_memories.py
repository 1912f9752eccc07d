"""What is listed of memories and their documents."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_fot.cli import main
from lightning_fot.library.library import Library, Saved
from tests.support.memories import SETTINGS, books


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _rows(said: str) -> list[list[str]]:
    return [re.split(r"  +", line) for line in said.splitlines()]


def test_where_there_are_none_it_says_how_to_make_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memories"]) == 0
    said = capsys.readouterr().out
    assert f"There are no memories in {here / 'memories'}." in said
    assert "ingest NAME PATH…" in said
    assert main(["memories", "mine"]) == 2
    assert "there is no folder memories/mine" in capsys.readouterr().err


def test_all_are_listed_and_a_damaged_one_hides_no_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 3)
    for name, paths in (("b", ["shelf/book0.txt"]), ("a", ["shelf"])):
        assert main(["ingest", name, *paths, *SETTINGS]) == 0
    (here / "memories" / "broken").mkdir()
    (here / "memories" / "broken" / "library.json").write_text("{", encoding="utf-8")
    (here / "memories" / "other").mkdir()
    capsys.readouterr()
    assert main(["memories"]) == 0
    said = capsys.readouterr()
    assert "memories/broken" in said.err
    assert "is damaged" in said.err
    head, *rows = _rows(said.out)
    assert head == ["memory", "documents", "tokens", "size", "model"]
    stored = [f"{Saved.read(here / 'memories' / name).stored:,}" for name in "ab"]
    assert [(row[0], row[1], row[2], row[4]) for row in rows] == [
        ("a", "3", stored[0], "tiny-random-llama"),
        ("b", "1", stored[1], "tiny-random-llama"),
    ]
    bytes_of = [sum(file.stat().st_size for file in (here / "memories" / name).iterdir()) for name in "ab"]
    assert [row[3] for row in rows] == [f"{size / 2**20:.1f} MiB" for size in bytes_of]


def test_documents_are_listed_with_what_was_read_of_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 3)
    (here / "shelf" / "clear\x1b[2J\n.txt").write_text("A text.", encoding="utf-8")
    assert main(["ingest", "mine", "shelf", *SETTINGS]) == 0
    library = Library.read(here / "memories" / "mine")
    by_name = {entry.name: entry for entry in library.documents}
    cut, leaving = by_name["shelf/book1.txt"], by_name["shelf/book2.txt"]
    cut.tokens = cut.read_at = None
    leaving.leaving = True
    library.changed(cut)
    library.changed(leaving)
    library.write()
    capsys.readouterr()
    assert main(["memories", "mine"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    head, *rows, last = _rows(said)
    assert head == ["document", "tokens", "state"]
    assert [" ".join(row) for row in rows] == [
        f"shelf/book0.txt {by_name['shelf/book0.txt'].tokens} complete",
        "shelf/book1.txt not read to its end",
        f"shelf/book2.txt {leaving.tokens} being forgotten",
        "shelf/clear\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}.txt 7 complete",
    ]
    assert last[0].startswith(f"memories/mine: 4 documents, {Saved.read(library.path).stored:,} tokens stored, ")
    # Reading changes nothing on the disk, and a folder is as good as a name.
    shutil.move(library.path, here / "moved")
    assert main(["memories", "./moved"]) == 0
    assert _rows(capsys.readouterr().out)[1:-1] == rows


def test_a_list_that_names_a_class_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is imported for it."""
    books(here / "shelf", 1)
    assert main(["ingest", "mine", "shelf", *SETTINGS]) == 0
    library = Library.read(here / "memories" / "mine")
    library.model = replace(library.model, memory={**library.model.memory, "retriever": "no.such.Index"})
    library.write()
    capsys.readouterr()
    assert main(["memories"]) == main(["memories", "mine"]) == 0
    assert "book0.txt" in capsys.readouterr().out
