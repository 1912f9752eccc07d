"""A named memory on disk: what ``lightning ingest`` writes and ``lightning ask`` reads.

The folder holds what ``Memory.save`` writes, and the list (see :mod:`lightning_fot.library.journal`): the model that
reads the memory, and its documents. The list is written before the memory, and says of each document how many tokens
had been read in all when it was complete. So where the two differ after a kill, the memory counts: a document is read
once the saved memory has come so far, even where ``capacity`` has dropped it since. A document that is to be forgotten
is marked so first, then the memory is saved without it, then it leaves the list: whoever writes next ends what a kill
has cut short. Where one takes the place of another, the list changes with the memory (:meth:`Library.commit`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lightning_fot.config.attending.renamed import current
from lightning_fot.config.retriever import check_named
from lightning_fot.errors import SettingError
from lightning_fot.library import journal
from lightning_fot.library.journal import FILE as FILE
from lightning_fot.library.journal import MEMORY_FILE as MEMORY_FILE
from lightning_fot.request.model import ModelSettings
from lightning_fot.system.digests import unsealed
from lightning_fot.system.files import clean, is_unfinished, lock

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

ROOT = Path("memories")
LOCK_FILE = ".lock"
# What kills left of files that versions before 0.2 were writing.
_UNFINISHED = ("tmp????????.part", f".{FILE}.????????")
_READS = 20
FORMAT = 2
# Format 1 had no places.
_READABLE = (1, 2)


class BusyError(SettingError):
    """Another process is writing to the folder."""


@dataclass
class Entry:
    """A document of a library.

    Args:
        name: Its name in the memory, unique.
        source: Its name where it was found.
        digest: SHA-256 of its text.
        tokens: How many it has, once it was read to its end.
        read_at: Tokens that the memory had read in all by then, those of other documents included.
        places: Where that text was found: see :class:`~lightning_fot.data.text.parts.DocumentSource`.
        leaving: Whether it is being forgotten.
    """

    name: str
    source: str
    digest: str
    tokens: int | None = None
    read_at: int | None = None
    places: list[str] = field(default_factory=list)
    leaving: bool = False

    def __post_init__(self) -> None:
        words = (self.name, self.source, self.digest, *self.places)
        if not all(isinstance(word, str) for word in words):
            raise TypeError("a document's name, source, digest and places must be text")

    @property
    def done(self) -> bool:
        """Whether it was read to its end."""
        return self.tokens is not None


@dataclass(frozen=True)
class Saved:
    """How far the memory in a folder has come.

    Args:
        seen: Tokens read in all.
        stored: Tokens that it holds.
    """

    seen: int = 0
    stored: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Asks the files that ``Memory.save`` wrote, without torch; zeros where there are none.

        Raises:
            SettingError: They are damaged.
        """
        file = path / MEMORY_FILE
        if not file.is_file():
            return cls()
        from safetensors import SafetensorError, safe_open

        text, before = "", None
        for _ in range(_READS):
            try:
                text = file.read_text(encoding="utf-8")
                index = unsealed(file, text)
                with safe_open(path / Path(index["log"]["file"]).name, framework="np") as log:
                    return cls(int(log.get_tensor("seen").sum()), sum(index["lengths"]))
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                wrong = error
                # A writer beside this process may have saved meanwhile, and removed what the index named.
                if text == before:
                    break
                before = text
        raise damaged(path, MEMORY_FILE, wrong) from wrong


class Library:
    """The folder of a named memory.

    Args:
        path: The folder.
        model: What reads the memory.
        documents: What is in it, in the order of reading.
    """

    def __init__(self, path: Path, model: ModelSettings, documents: Iterable[Entry] = ()) -> None:
        self.path = path
        self.model = model
        self._set(documents)

    def _set(self, documents: Iterable[Entry]) -> None:
        self._entries = {entry.name: entry for entry in documents}
        self._by_digest: dict[str, Entry] = {}
        for entry in self._entries.values():
            self._by_digest.setdefault(entry.digest, entry)
        # The next number for a name that is taken.
        self._numbers: dict[str, int] = {}
        # What the disk does not have yet; without a digest of a list there, all of it.
        self._changes: list[dict[str, object]] = []
        self._digest: str | None = None
        self._written_model: ModelSettings | None = None

    @property
    def documents(self) -> Sequence[Entry]:
        """What is in it, in the order of reading."""
        return list(self._entries.values())

    def __len__(self) -> int:
        """Documents."""
        return len(self._entries)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the list, as far as the memory beside it bears it out.

        Raises:
            SettingError: There is none, or it or the memory cannot be read.
        """
        if not (path / FILE).is_file():
            raise SettingError("MEMORY", str(path), f"holds no {FILE}", _others())
        try:
            content, listed = journal.read_list(path)
            written = content["format"]
            if isinstance(written, bool) or written not in _READABLE:
                raise SettingError(
                    "MEMORY", str(path), f"has format {written!r}",
                    f"This version reads formats {' and '.join(map(str, _READABLE))}.",
                )  # fmt: skip
            stored = content["model"]
            model = ModelSettings(**{**stored, "memory": {"attending": None, **current(stored["memory"])}})
            documents = [Entry(**document) for document in listed.values()]
            model.config  # noqa: B018  (settings that cannot work are found here)
            seen = Saved.read(path).seen
            for document in documents:
                if document.read_at is None or document.read_at > seen:
                    document.tokens = document.read_at = None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, SettingError) and error.setting == "MEMORY":
                raise
            raise damaged(path, FILE, error) from error
        return cls(path, model, documents)

    def refuse_foreign(self, given: bool = False) -> None:
        """Refuses a retriever that the list names by its class: whoever wrote the list could have any code run.

        Args:
            given: Whether the user has named the retriever too.

        Raises:
            SettingError: It does.
        """
        if not given:
            check_named(self.model.config.retriever, str(self.path / FILE))

    def refresh(self) -> None:
        """Takes the documents from the disk, where another process may have added some.

        Raises:
            SettingError: It has made the memory with other settings, or ``library.json`` cannot be read.
        """
        if not (self.path / FILE).is_file():
            return
        now = Library.read(self.path)
        if now.model.flat() != self.model.flat():
            raise SettingError(
                "MEMORY", str(self.path), "another process has just made it with other settings", "Try again."
            )
        self._set(now.documents)

    def write(self, durable: bool = False) -> None:
        """Brings to the disk what has changed since the last time: its cost is that of the changes.

        Args:
            durable: Whether it has to outlive a power cut that follows at once.

        Raises:
            SettingError: The folder cannot be written.
        """
        if self._digest is None or self._written_model != self.model:
            self.write_whole()
            return
        digest, self._digest = self._digest, None
        try:
            if self._changes or durable:
                journal.append(self.path, digest, self._changes, durable)
        except OSError as error:
            # What of a line is there now, nobody knows: from here on the list is written whole.
            raise cannot_write(self.path, error) from error
        self._changes, self._digest = [], digest

    def write_whole(self) -> None:
        """Writes ``library.json`` as a whole, which ends its journal.

        Raises:
            SettingError: The folder cannot be written.
        """
        content = {"format": FORMAT, "model": asdict(self.model)}
        self._digest = None
        try:
            self._digest = journal.write_list(self.path, content, map(asdict, self._entries.values()))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._changes, self._written_model = [], self.model

    def find(self, digest: str) -> Entry | None:
        """The document with that text, unless it is being forgotten."""
        entry = self._by_digest.get(digest)
        return None if entry is None or entry.leaving else entry

    def named(self, name: str) -> Entry | None:
        """The document of that name."""
        return self._entries.get(name)

    def add(self, source: str, digest: str, places: Iterable[str] = ()) -> Entry:
        """A new document; its name is that of its source, with a number where that is taken."""
        entry = Entry(self.free_name(source), source, digest, places=list(places))
        self._put(entry)
        self.changed(entry)
        return entry

    def free_name(self, source: str, leaving: Collection[str] = (), taken: Collection[str] = ()) -> str:
        """A name for a document of that source: with a number where it is taken.

        Args:
            source: Its name where it was found.
            leaving: Names that will be free.
            taken: Names that will not.
        """
        name, number = source, 2 if leaving or taken else self._numbers.get(source, 2)
        while (name in self._entries and name not in leaving) or name in taken:
            name, number = f"{source} ({number})", number + 1
            if not (leaving or taken):
                self._numbers[source] = number
        return name

    def commit(self, save: Callable[[], object], drop: Iterable[Entry], put: Sequence[Entry]) -> None:
        """Changes the list together with the memory: whatever happens, both count or neither.

        Args:
            save: Saves the memory into the folder.
            drop: Documents that it no longer holds.
            put: Documents that it holds from then on; they may have the names of those that go.

        Raises:
            SettingError: The folder cannot be written.
        """
        gone = list(drop)
        self.write()
        digest, self._digest = self._digest, None
        assert digest is not None
        changes: list[dict[str, object]] = [{"drop": entry.name} for entry in gone]
        changes += [{"put": asdict(entry)} for entry in put]
        try:
            once = {"once": journal.memory_digest(self.path), "changes": changes}
            journal.append(self.path, digest, [once], durable=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        # Where this fails the list is written whole the next time, as it was.
        save()
        for entry in gone:
            self._drop(entry)
        for entry in put:
            self._put(entry)
        self._digest = digest

    def changed(self, entry: Entry) -> None:
        """Notes that a document is to be written again."""
        self._changes.append({"put": asdict(entry)})

    def remove(self, entry: Entry) -> None:
        """Takes a document from the list."""
        self._drop(entry)
        self._changes.append({"drop": entry.name})

    def _put(self, entry: Entry) -> None:
        self._entries[entry.name] = entry
        self._by_digest[entry.digest] = entry

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.name]
        if self._by_digest.get(entry.digest) is entry:
            del self._by_digest[entry.digest]
        # Its name is free again, and so are those with a number.
        self._numbers.pop(entry.source, None)

    def load(self, lm: MemoryLM) -> Memory:
        """The memory; an empty one where none was saved yet.

        Raises:
            SettingError: It is damaged, or was made by another model.
        """
        return lm.load_memory(self.path) if (self.path / MEMORY_FILE).is_file() else lm.new_memory(1)

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """What another process that writes into the folder changes: compared, it tells whether one has."""
        files = (FILE, journal.JOURNAL, MEMORY_FILE)
        found = []
        for name in files:
            with suppress(FileNotFoundError):
                status = (self.path / name).stat()
                found.append((name, status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing into the folder.

        Raises:
            BusyError: Another process is at it.
            SettingError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = lock(self.path / LOCK_FILE)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if held is None:
            raise BusyError("MEMORY", str(self.path), "another process is writing to it", "Wait until it is done.")
        with held:
            for left in [file for pattern in _UNFINISHED for file in self.path.glob(pattern)]:
                left.unlink(missing_ok=True)
            clean(self.path)
            yield


def find_folder(word: str) -> Path:
    """The folder that MEMORY means: a path, or a name below ``memories/``.

    Raises:
        SettingError: It is empty, or a file.
    """
    if not word.strip():
        raise SettingError("MEMORY", word, "is empty", "Give a name, or a folder.")
    path = Path(word).expanduser()
    is_name = path.name == word and word not in (".", "..")
    if is_name and not (path / FILE).is_file():
        path = ROOT / word
    if path.is_file():
        raise SettingError("MEMORY", word, "is a file", "Give the memory first: a name, or a folder.")
    return path


def is_free(path: Path) -> bool:
    """Whether a new memory can be made in a folder: it is missing or empty, but for what a kill may have left."""
    if not path.is_dir():
        return True
    return all(
        file.name == LOCK_FILE or is_unfinished(file) or any(map(file.match, _UNFINISHED)) for file in path.iterdir()
    )


def existing(word: str) -> Library:
    """The library that MEMORY means.

    Raises:
        SettingError: There is none, or it is damaged.
    """
    path = find_folder(word)
    if not path.is_dir():
        raise SettingError("MEMORY", word, f"there is no folder {path}", _others())
    return Library.read(path)


def cannot_write(path: Path, error: OSError) -> SettingError:
    """The error for a folder that cannot be written."""
    return SettingError("MEMORY", str(path), f"cannot be written ({error.strerror})", "Choose another folder.")


def count(number: int, noun: str) -> str:
    """Such as ``1 document`` and ``2,000 documents``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_of(path: Path) -> str:
    """What the files of a folder take, such as ``1.5 MiB``."""
    return f"{sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 2**20:,.1f} MiB"


def damaged(
    path: Path, file: str, error: Exception, fix: str = "Ingest the documents into a new memory."
) -> SettingError:
    """The error for a file of the folder that cannot be understood."""
    return SettingError("MEMORY", str(path), f"{file} is damaged ({type(error).__name__}: {error})", fix)


def _others() -> str:
    names = sorted(file.parent.name for file in ROOT.glob(f"*/{FILE}")) if os.path.isdir(ROOT) else []
    known = f"There are: {', '.join(names)}. " if names else ""
    return f"{known}Make one with: lightning ingest NAME PATH…"
