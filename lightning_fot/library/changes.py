"""What of the documents found is new, has changed, or has gone since a library read them.

A document is known by its text, and each text has the places where it was found. So one that was moved or copied is not
read again, and one whose only place has another text now is a former version of what stands there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True)
class Replacement:
    """Documents that take the places of others: these are kept until all of those are read.

    Args:
        outdated: What was read there before.
        unread: What stands there now.
    """

    outdated: tuple[Entry, ...]
    unread: tuple[Unread, ...]


@dataclass
class Changes:
    """What there is to do.

    Attributes:
        unread: Documents to be read, in the order in which they were found.
        outdated: What is to be forgotten: former versions, and what a command that was killed had begun to forget.
        replaced: Which of ``outdated`` is forgotten for which of ``unread``.
        renamed: Documents that stand elsewhere now, each with the name that it gets: its own is another one's there.
        gone: What was read from below the paths and stands nowhere any more. It is kept.
        known: Documents that were read already.
        twice: Documents with the same text as another that was found.
    """

    unread: list[Unread] = field(default_factory=list)
    outdated: list[Entry] = field(default_factory=list)
    replaced: list[Replacement] = field(default_factory=list)
    renamed: list[tuple[Entry, str]] = field(default_factory=list)
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
    changes.replaced = _replacements(changes, now)
    changes.renamed = _renamed(library, by_digest, set(map(id, changes.outdated)))
    return changes


def _replacements(changes: Changes, now: dict[str, str]) -> list[Replacement]:
    """Whole documents that are outdated, each with what takes its place, in the order of reading."""
    unread = {one.digest: one for one in changes.unread}
    whole = [entry for entry in changes.outdated if entry.done and not entry.leaving]
    follows = {entry.name: [unread[now[one]] for one in entry.places if now.get(one) in unread] for entry in whole}
    # A line that was put in or taken out moves all others: what was edited has no place in common with what it was.
    taken = {one.digest for ones in follows.values() for one in ones}
    new: dict[str, list[Unread]] = {}
    for one in changes.unread:
        if one.digest not in taken and one.source.parts[0].offset is not None:
            new.setdefault(_file_of(one.source.place), []).append(one)
    for entry in whole:
        lines = next((lines for place in entry.places if (lines := new.get(_file_of(place)))), None)
        if not follows[entry.name] and lines:
            follows[entry.name] = [lines.pop(0)]
    return _joined([(entry, follows[entry.name]) for entry in whole if follows[entry.name]], changes.unread)


def _joined(pairs: list[tuple[Entry, list[Unread]]], unread: Iterable[Unread]) -> list[Replacement]:
    """Groups that have no document in common."""
    by_digest: dict[str, list[int]] = {}
    for number, (_, ones) in enumerate(pairs):
        for one in ones:
            by_digest.setdefault(one.digest, []).append(number)
    groups: list[Replacement] = []
    grouped: set[str] = set()
    for first in unread:
        if first.digest in grouped or first.digest not in by_digest:
            continue
        group, ahead = {first.digest: first}, [first]
        entries: dict[int, Entry] = {}
        while ahead:
            for number in by_digest[ahead.pop().digest]:
                entries[number], others = pairs[number]
                fresh = {one.digest: one for one in others if one.digest not in group}
                group |= fresh
                ahead += fresh.values()
        grouped |= group.keys()
        groups.append(Replacement(tuple(entries.values()), tuple(group.values())))
    return groups


def _renamed(
    library: Library, by_digest: dict[str, list[DocumentSource]], outdated: set[int]
) -> list[tuple[Entry, str]]:
    """Documents whose names are those of other documents that were found, with the names of their places."""
    owners: dict[str, set[str]] = {}
    for digest, sources in by_digest.items():
        for source in sources:
            owners.setdefault(source.name, set()).add(digest)
    found = []
    for entry in library.documents:
        sources = by_digest.get(entry.digest, [])
        # Whoever stands where the name leads to keeps it; so does what stands elsewhere, where nobody has looked.
        if not sources or id(entry) in outdated or not owners.get(entry.source, set()) - {entry.digest}:
            continue
        names = [source.name for source in sources]
        if entry.source not in names and set(entry.places) <= {source.place for source in sources}:
            found.append((entry, names[0]))
    return found


def digest_of(source: DocumentSource, skipped: Skipped) -> str | None:
    """SHA-256 of a document's text; None where there is none.

    Args:
        source: The document; it is read once.
        skipped: Counts what turns out to be no text.
    """
    text, empty, before = TextDigest(source.pieces(skipped)), True, skipped.total()
    for piece in text:
        empty = empty and not piece.strip()
    if empty and skipped.total() == before:
        leave_out(skipped, EMPTY, source.name)
    return None if empty else text.hexdigest()


class TextDigest:
    """Pieces of a text as they come, and SHA-256 of all that have come."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces, self._digest = pieces, hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self._digest.update(piece.encode("utf-8", "surrogatepass"))
            yield piece

    def hexdigest(self) -> str:
        """Of what has come so far."""
        return self._digest.hexdigest()


class _Looked:
    """Which places were looked at."""

    def __init__(self, found: Found, paths: Iterable[str]) -> None:
        self._roots = [place_of(Path(path).expanduser()) for path in paths]
        self._files = {_file_of(source.place) for source in found.documents if source.parts[0].offset is not None}

    def a_line_of(self, place: str) -> bool:
        """Whether it is a line of a file whose lines were all looked at."""
        return _file_of(place) in self._files

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
    return os.path.lexists(place) or os.path.lexists(_file_of(place))


def _file_of(place: str) -> str:
    """The file of a line."""
    return place.rpartition(":")[0]
