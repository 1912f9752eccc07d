"""Files of text: which ones are text at all, and their text in pieces. Only the standard library is imported.

Text is UTF-8, or UTF-16 or UTF-32 that begins with its byte-order mark. What holds a NUL or half a surrogate pair is no
text: neither has a meaning for a tokenizer.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "site-packages", "dist-packages", "CVS"})
_GENERATED = re.compile(rb"(?i)auto-?generated|generated from|gencodec|do not edit")
SNIFFED_BYTES = 64 * 1024
BLOCK_BYTES = 8 * 1024 * 1024
LARGE_FILE_BYTES = 100 * 1024 * 1024
NO_TEXT = "binary or not UTF-8"
UNREADABLE = "unreadable"
EMPTY = "empty"
CHANGED = "changed meanwhile"
# Names kept of what was left out for one reason.
_NAMED = 10
_BEFORE_A_BYTE = re.compile(r"\\+(?=x[0-9a-f]{2}|[\udc80-\udcff])")
# The longer marks first: that of UTF-32 begins like one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Skipped(Counter[str]):
    """What was left out: how much of it, by reason, and the names of the first few."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.names: dict[str, list[str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self),), {"names": self.names})

    def text(self, named: bool = False) -> str:
        """Such as ``3 binary or not UTF-8, 1 empty``, with names where they are wanted; empty when nothing was."""
        said = []
        for reason, count in self.most_common():
            names = self.names.get(reason, []) if named else []
            more = f" and {count - len(names):,} more" if len(names) < count else ""
            said.append(f"{count:,} {reason}" + (f" ({', '.join(names)}{more})" if names else ""))
        return ", ".join(said)


def leave_out(skipped: Counter[str] | None, reason: str, name: str) -> None:
    """Counts something that is left out, and keeps its name."""
    if skipped is None:
        return
    skipped[reason] += 1
    if isinstance(skipped, Skipped):
        names = skipped.names.setdefault(reason, [])
        if len(names) < _NAMED:
            names.append(name)


def readable(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 are written out as in a Python string.

    Different names stay different: backslashes before such a byte, or before what looks like one, are doubled.
    """
    return os.fsencode(_BEFORE_A_BYTE.sub(r"\g<0>\g<0>", name)).decode("utf-8", "backslashreplace")


def check_text(text: str) -> None:
    """Refuses what no tokenizer can read.

    Raises:
        UnicodeError: It holds a NUL or half a surrogate pair.
    """
    if "\0" in text:
        raise UnicodeError("it holds a NUL")
    # Raises for half a pair. Its own message would quote all of the text.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnicodeError("it holds half a surrogate pair") from None


@dataclass(frozen=True)
class FilePart:
    """A file, or one line of a ``.jsonl`` file, as part of a document.

    Args:
        path: The file.
        size: Bytes that the part takes on disk: an estimate of its text, and an upper bound for most tokenizers.
        header: Line put before the text in joined documents.
        offset: Byte at which the line starts, for ``.jsonl``; None takes the whole file.
        field: Key of the text in the line's object, for ``.jsonl``.
        encoding: Of the line, for ``.jsonl``; a whole file tells by its mark.
    """

    path: str
    size: int
    header: str = ""
    offset: int | None = None
    field: str = "text"
    encoding: str = "utf-8-sig"

    @property
    def key(self) -> tuple[str, int | None]:
        """The file or line itself, whatever links lead to it."""
        return os.path.realpath(self.path), self.offset

    def pieces(self) -> Iterator[str]:
        """The text in pieces, so that a huge file is not read beyond what is asked for.

        Raises:
            UnicodeError: No text after all (only the file's first part was looked at when it was found). Files of up
                to 100 MB are judged before the first piece is given; of larger ones bad bytes and NULs are replaced.
            ValueError: A line is not what it was when it was found.
            OSError: The file has gone or cannot be read.
        """
        if self.offset is not None:
            yield self._line()
            return
        # Losing a huge book to one bad byte far inside helps nobody; a smaller file is judged as a whole.
        strict = self.size <= LARGE_FILE_BYTES
        if strict and self.size > BLOCK_BYTES:
            for _ in self._blocks(strict):
                pass
        first = True
        for text in self._blocks(strict):
            yield self.header + text if first else text
            first = False

    def _line(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            line = file.read(self.size)
        try:
            text = json.loads(decode_line(line, self.encoding))[self.field]
        except (RecursionError, LookupError, TypeError) as error:
            raise ValueError("the line has changed") from error
        if not isinstance(text, str):
            raise ValueError("the line has changed")
        check_text(text)
        return text

    def _blocks(self, strict: bool) -> Iterator[str]:
        with open(self.path, "rb") as file:
            block = file.read(BLOCK_BYTES)
            decoder = _decoder(encoding_of(block), "strict" if strict else "replace")
            first = True
            while True:
                following = file.read(BLOCK_BYTES) if len(block) == BLOCK_BYTES else b""
                text = decoder.decode(block, final=not following)
                if first:
                    text = text.removeprefix("\ufeff")
                if strict and "\0" in text:
                    raise UnicodeError("it holds a NUL")
                if text:
                    yield text if strict else text.replace("\0", "\ufffd")
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
        place: Where it stands: the real path of its file or folder, with the line's number for ``.jsonl``. A document
            with the same place and another text is a later version of the same.
    """

    name: str
    parts: tuple[FilePart, ...]
    place: str = ""

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
            except UnicodeError:
                leave_out(skipped, NO_TEXT, readable(part.path))
            except ValueError:
                leave_out(skipped, CHANGED, self.name)
            except OSError:
                leave_out(skipped, UNREADABLE, readable(part.path))


@dataclass
class Found:
    """Documents found, and how many files or lines were left out, by reason."""

    documents: list[DocumentSource] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)

    def skipped_text(self, named: bool = False) -> str:
        """Such as ``3 binary or not UTF-8, 1 empty``; empty when nothing was skipped."""
        return self.skipped.text(named)


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
        leave_out(skipped, UNREADABLE, readable(str(root)))
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
            leave_out(skipped, UNREADABLE, readable(str(path)))
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
    name = readable(str(path))
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(SNIFFED_BYTES)
    except OSError:
        leave_out(skipped, UNREADABLE, name)
        return None
    complete = size <= len(head)
    encoding = encoding_of(head)
    try:
        text = _decoder(encoding).decode(head, final=complete)
        check_text(text)
    except UnicodeError:
        leave_out(skipped, NO_TEXT, name)
        return None
    if complete and not text.removeprefix("\ufeff").strip():
        leave_out(skipped, EMPTY, name)
        return None
    if generated and _GENERATED.search(head[:400]):
        leave_out(skipped, "generated", name)
        return None
    return FilePart(str(path), size, header, encoding=encoding)


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes of a file tell, for :func:`decode_line` and decoders."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8-sig")


def _decoder(encoding: str, errors: str = "strict") -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder(encoding)(errors)


def decode_line(line: bytes, encoding: str) -> str:
    """The text of one line, without a mark before it.

    Raises:
        UnicodeDecodeError: It is not of that encoding.
    """
    return line.decode(encoding).removeprefix("\ufeff")


def lines_of(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Lines of a file with their ends, as bytes of that encoding."""
    if encoding == "utf-8-sig":
        yield from file
        return
    end = "\n".encode(encoding)
    line = b""
    # A byte of a line feed may also be a part of another character.
    while part := file.readline():
        line += part
        line += file.read(-len(line) % len(end))
        if line[-len(end) :] == end:
            yield line
            line = b""
    if line:
        yield line
