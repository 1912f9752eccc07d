"""What of the documents found is new, has changed, or has gone since a library read them.

A document is known by its text, and each text has the places where it was found. So one that was moved or copied is not
read again, and one whose only place has another text now is a former version of what stands there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fot.data.text.parts import EMPTY, leave_out
from lightning_fot.data.text.readers import place_of

if TYPE_CHECKING:
    from lightning_fot.data.text.parts import DocumentSource, Found, Skipped
    from lightning_fot.library.library import Entry, Library


@dataclass(frozen=True)
class Unread:
    """A document to be read.

    Args:
        source: Where its text is.
        digest: SHA-256 of the text.
        places: All places where that text was found.
    """

    source: DocumentSource
    digest: str
    places: tuple[str, ...] = ()


@dataclass
class Changes:
    """What there is to do.

    Attributes:
        unread: Documents to be read, in the order in which they were found.
        outdated: What is to be forgotten: former versions, and what a command that was killed had begun to forget.
        gone: What was read from below the paths and stands nowhere any more. It is kept.
        known: Documents that were read already.
        twice: Documents with the same text as another that was found.
    """

    unread: list[Unread] = field(default_factory=list)
    outdated: list[Entry] = field(default_factory=list)
    gone: list[Entry] = field(default_factory=list)
    known: int = 0
    twice: int = 0


def find_changes(found: Found, library: Library, paths: Iterable[str]) -> Changes:
    """Compares what was found with what a library holds, and notes new places there.

    Args:
        found: Documents. Whatever turns out to be no text is added to what it skipped.
        library: Its documents are given the places where they stand now.
        paths: What was looked through.
    """
    changes = Changes()
    by_digest: dict[str, list[DocumentSource]] = {}
    now: dict[str, str] = {}
    for source in found.documents:
        digest = digest_of(source, found.skipped)
        if digest is not None:
            by_digest.setdefault(digest, []).append(source)
            now[source.place] = digest
    _compare(library, now, _Looked(found, paths), changes)
    for digest, sources in by_digest.items():
        entry = library.find(digest)
        changes.twice += len(sources) - 1
        if entry is not None and entry.done:
            changes.known += 1
            continue
        changes.unread.append(Unread(sources[0], digest, tuple(dict.fromkeys(one.place for one in sources))))
    # Lists of format 1 knew documents that were cut by name alone: their rest will never come.
    cut = {one.source.name for one in changes.unread if library.find(one.digest) is None}
    for entry in library.documents:
        if not entry.done and not entry.places and entry.source in cut and entry.digest not in by_digest:
            changes.outdated.append(entry)
    return changes


def digest_of(source: DocumentSource, skipped: Skipped) -> str | None:
    """SHA-256 of a document's text; None where there is none.

    Args:
        source: The document; it is read once.
        skipped: Counts what turns out to be no text.
    """
    digest, empty, before = hashlib.sha256(), True, skipped.total()
    for piece in source.pieces(skipped):
        digest.update(piece.encode("utf-8", "surrogatepass"))
        empty = empty and not piece.strip()
    if empty and skipped.total() == before:
        leave_out(skipped, EMPTY, source.name)
    return None if empty else digest.hexdigest()


class _Looked:
    """Which places were looked at."""

    def __init__(self, found: Found, paths: Iterable[str]) -> None:
        self._roots = [place_of(Path(path).expanduser()) for path in paths]
        self._files = {
            source.place.rpartition(":")[0] for source in found.documents if source.parts[0].offset is not None
        }

    def a_line_of(self, place: str) -> bool:
        """Whether it is a line of a file whose lines were all looked at."""
        return place.rpartition(":")[0] in self._files

    def below(self, place: str) -> bool:
        """Whether it lies below one of the paths."""
        return any(
            place == root or place.startswith((root.rstrip(os.sep) + os.sep, f"{root}:")) for root in self._roots
        )


def _compare(library: Library, now: dict[str, str], looked: _Looked, changes: Changes) -> None:
    """Gives each document its places of now, and finds those that have none left."""
    places: dict[str, list[str]] = {}
    for place, digest in now.items():
        places.setdefault(digest, []).append(place)
    for entry in library.documents:
        if entry.leaving:
            changes.outdated.append(entry)
            continue
        here = places.get(entry.digest, [])
        changed: list[str] = []
        missing: list[str] = []
        elsewhere: list[str] = []
        for place in entry.places:
            if place in now:
                changed += [place] * (now[place] != entry.digest)
            elif looked.a_line_of(place):
                changed.append(place)
            else:
                (missing if looked.below(place) else elsewhere).append(place)
        if changed or here:
            elsewhere = [place for place in elsewhere if _is_there(place)]
        if changed and not here and not elsewhere:
            changes.outdated.append(entry)
            continue
        if missing and not here and not elsewhere:
            changes.gone.append(entry)
            continue
        left = [*elsewhere, *here]
        if left != entry.places and (changed or missing or set(left) != set(entry.places)):
            entry.places = left
            library.changed(entry)


def _is_there(place: str) -> bool:
    return os.path.lexists(place) or os.path.lexists(place.rpartition(":")[0])
