"""``lightning memories``: the named memories here, or the documents of one. Loads no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fot.errors import SettingError
from lightning_fot.library.library import FILE, ROOT, Library, Saved, count, existing, size_of
from lightning_fot.request.words import Verb, read

if TYPE_CHECKING:
    from lightning_fot.library.library import Entry

VERB = Verb(
    "lightning memories",
    plain=("[MEMORY]",),
    plain_about=("a name below memories/, or a folder",),
    about="Lists the memories below memories/, or the documents of one.",
)


def memories(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``memories``.
        program: How it was called.
        debug: Changes nothing here.

    Returns:
        Exit code: 0.

    Raises:
        SettingError: There is no such memory, or it is damaged.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
    elif given.plain:
        _documents(existing(given.plain[0]))
    else:
        _all(program)
    return 0


def _all(program: str) -> None:
    folders = sorted(file.parent for file in ROOT.glob(f"*/{FILE}"))
    if not folders:
        ingest = f"{program.removesuffix('memories')}ingest NAME PATH…"
        print(f"There are no memories in {Path.cwd() / ROOT}. Make one: {ingest}")
        return
    rows = [("memory", "documents", "tokens", "size", "model")]
    for folder in folders:
        try:
            library, saved = Library.read(folder), Saved.read(folder)
        except SettingError as error:
            # One that is damaged hides no other.
            print(error, file=sys.stderr)
            continue
        documents, tokens = f"{len(library):,}", f"{saved.stored:,}"
        rows.append((folder.name, documents, tokens, size_of(folder), _one_line(library.model.backbone)))
    _table(rows)


def _documents(library: Library) -> None:
    rows = [("document", "tokens", "state")]
    rows += [
        (_one_line(entry.name), "" if entry.tokens is None else f"{entry.tokens:,}", _state(entry))
        for entry in library.documents
    ]
    _table(rows)
    stored = Saved.read(library.path).stored
    print(
        f"{library.path}: {count(len(library), 'document')}, {stored:,} tokens stored, {size_of(library.path)}, "
        f"read by {library.model.backbone}."
    )


def _state(entry: Entry) -> str:
    if entry.leaving:
        return "being forgotten"
    return "complete" if entry.done else "not read to its end"


def _one_line(text: str) -> str:
    """A name without what would break a table or steer a terminal."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns, the first and the last on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    for row in rows:
        cells = [
            cell.ljust(width) if number in (0, last) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
