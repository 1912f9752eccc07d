"""Files of text: which ones are text at all, and their text in pieces. Only the standard library is imported."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "site-packages", "dist-packages", "CVS"})
_GENERATED = re.compile(rb"(?i)auto-?generated|generated from|gencodec|do not edit")
SNIFFED_BYTES = 64 * 1024
BLOCK_BYTES = 8 * 1024 * 1024
LARGE_FILE_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class FilePart:
    """A file, or one line of a ``.jsonl`` file, as part of a document.

    Args:
        path: The file.
        size: Bytes that the part takes on disk: an estimate of its text, and an upper bound for most tokenizers.
        header: Line put before the text in joined documents.
        offset: Byte at which the line starts, for ``.jsonl``; None takes the whole file.
        field: Key of the text in the line's object, for ``.jsonl``.
    """

    path: str
    size: int
    header: str = ""
    offset: int | None = None
    field: str = "text"

    @property
    def key(self) -> tuple[str, int | None]:
        """The file or line itself, whatever links lead to it."""
        return os.path.realpath(self.path), self.offset

    def pieces(self) -> Iterator[str]:
        """The text in pieces, so that a huge file is not read beyond what is asked for.

        Raises:
            UnicodeDecodeError: Not UTF-8 after all (only the file's first part was looked at when it was found).
            OSError: The file has gone or cannot be read.
        """
        if self.offset is not None:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                yield json.loads(file.read(self.size).decode("utf-8-sig"))[self.field]
            return
        with open(self.path, "rb") as file:
            # Losing a huge book to one bad byte far inside helps nobody; a small file is judged as a whole.
            errors = "strict" if self.size <= LARGE_FILE_BYTES else "replace"
            block = file.read(BLOCK_BYTES)
            decoder = codecs.getincrementaldecoder(_encoding(block))(errors)
            first = True
            while True:
                following = file.read(BLOCK_BYTES) if len(block) == BLOCK_BYTES else b""
                text = decoder.decode(block, final=not following)
                if text:
                    yield self.header + text if first else text
                    first = False
                if not following:
                    return
                block = following


@dataclass(frozen=True)
class DocumentSource:
    """Where the text of a document is; nothing is read before ``pieces`` is used.

    Args:
        name: Shown in messages and results.
        parts: Files, or one ``.jsonl`` line.
    """

    name: str
    parts: tuple[FilePart, ...]

    @property
    def size(self) -> int:
        """Bytes on disk, headers included."""
        return sum(part.size + len(part.header) for part in self.parts)

    @property
    def keys(self) -> frozenset[tuple[str, int | None]]:
        """The files or lines themselves."""
        return frozenset(part.key for part in self.parts)

    def pieces(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """The text in order; parts that turn out to be unreadable are left out.

        Args:
            skipped: Counts parts left out, by reason.
        """
        for number, part in enumerate(self.parts):
            try:
                yield from part.pieces()
                if number + 1 < len(self.parts):
                    yield "\n"
            except UnicodeDecodeError:
                if skipped is not None:
                    skipped["binary or not UTF-8"] += 1
            except OSError:
                if skipped is not None:
                    skipped["unreadable"] += 1


@dataclass
class Found:
    """Documents found, and how many files or lines were left out, by reason."""

    documents: list[DocumentSource] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def skipped_text(self) -> str:
        """Such as ``3 binary or not UTF-8, 1 empty``; empty when nothing was skipped."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())


def walk(
    root: Path, seen: set[tuple[int, int]], skipped: Counter[str], without: Iterable[str] = ()
) -> Iterator[tuple[Path, list[Path]]]:
    """Folders below ``root`` with their files, sorted. Links are followed, and nothing is visited twice."""
    if not is_new(root, seen):
        return
    files, folders = [], []
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        skipped["unreadable"] += 1
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = root / entry.name
        try:
            if entry.is_dir():
                if entry.name not in SKIPPED_FOLDERS and entry.name not in without:
                    folders.append(path)
            elif entry.is_file() and is_new(path, seen):
                files.append(path)
        except OSError:
            skipped["unreadable"] += 1
    yield root, files
    for folder in folders:
        yield from walk(folder, seen, skipped, without)


def is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether the file or folder behind ``path`` was not seen yet (by inode: a link and its target are one file)."""
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    if status.st_ino and key in seen:
        return False
    seen.add(key)
    return True


def text_part(path: Path, skipped: Counter[str], header: str = "", generated: bool = False) -> FilePart | None:
    """The file as a part; None, counted in ``skipped``, when empty, binary, unreadable or (if asked for) generated."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(SNIFFED_BYTES)
    except OSError:
        skipped["unreadable"] += 1
        return None
    if not head.strip():
        skipped["empty"] += 1
        return None
    encoding = _encoding(head)
    try:
        if encoding != "utf-16" and b"\0" in head:
            raise UnicodeError
        codecs.getincrementaldecoder(encoding)().decode(head, final=size <= len(head))
    except UnicodeError:
        skipped["binary or not UTF-8"] += 1
        return None
    if generated and _GENERATED.search(head[:400]):
        skipped["generated"] += 1
        return None
    return FilePart(str(path), size, header)


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
