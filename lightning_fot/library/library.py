"""A named memory on disk: what ``lightning ingest`` writes and ``lightning ask`` reads.

The folder holds what ``Memory.save`` writes, and ``library.json``: the model that reads the memory, and its documents.
The list is written before the memory, and says of each document how many tokens had been read in all when it was
complete. So where the two differ after a kill, the memory counts: a document is read once the saved memory has come so
far, even where ``capacity`` has dropped it since.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lightning_fot.config.attending.renamed import current
from lightning_fot.errors import SettingError
from lightning_fot.request.model import ModelSettings
from lightning_fot.system.digests import read_sealed, unsealed, write_sealed
from lightning_fot.system.files import clean, is_unfinished

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

ROOT = Path("memories")
FILE = "library.json"
MEMORY_FILE = "memory.json"
LOCK_FILE = ".lock"
# What kills left of files that versions before 0.2 were writing.
_UNFINISHED = ("tmp????????.part", f".{FILE}.????????")
_READS = 20
FORMAT = 1


@dataclass
class Entry:
    """A document of a library.

    Args:
        name: Its name in the memory, unique.
        source: Its name where it was found.
        digest: SHA-256 of its text.
        tokens: How many it has, once it was read to its end.
        read_at: Tokens that the memory had read in all by then, those of other documents included.
    """

    name: str
    source: str
    digest: str
    tokens: int | None = None
    read_at: int | None = None

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


@dataclass
class Library:
    """The folder of a named memory.

    Args:
        path: The folder.
        model: What reads the memory.
        documents: What is in it, in the order of reading.
    """

    path: Path
    model: ModelSettings
    documents: list[Entry] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads ``library.json``, as far as the memory beside it bears it out.

        Raises:
            SettingError: There is none, or it or the memory cannot be read.
        """
        file = path / FILE
        if not file.is_file():
            raise SettingError("MEMORY", str(path), f"holds no {FILE}", _others())
        try:
            content = read_sealed(file)
            if content["format"] != FORMAT:
                raise SettingError(
                    "MEMORY", str(path), f"has format {content['format']}", f"This version reads format {FORMAT}."
                )
            stored = content["model"]
            model = ModelSettings(**{**stored, "memory": {"attending": None, **current(stored["memory"])}})
            documents = [Entry(**document) for document in content["documents"]]
            model.config  # noqa: B018  (settings that cannot work are found here)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, SettingError) and error.setting == "MEMORY":
                raise
            raise damaged(path, FILE, error) from error
        seen = Saved.read(path).seen
        for document in documents:
            if document.read_at is None or document.read_at > seen:
                document.tokens = document.read_at = None
        return cls(path, model, documents)

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
        self.documents = now.documents

    def write(self) -> None:
        """Writes ``library.json`` as a whole.

        Raises:
            SettingError: The folder cannot be written.
        """
        content = {
            "format": FORMAT,
            "model": asdict(self.model),
            "documents": [asdict(document) for document in self.documents],
        }
        try:
            write_sealed(self.path / FILE, content)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def find(self, digest: str) -> Entry | None:
        """The document with that text."""
        return next((document for document in self.documents if document.digest == digest), None)

    def add(self, source: str, digest: str) -> Entry:
        """A new document; its name is that of its source, with a number where that is taken."""
        taken = {document.name for document in self.documents}
        name, number = source, 2
        while name in taken:
            name, number = f"{source} ({number})", number + 1
        self.documents.append(Entry(name, source, digest))
        return self.documents[-1]

    def load(self, lm: MemoryLM) -> Memory:
        """The memory; an empty one where none was saved yet.

        Raises:
            SettingError: It is damaged, or was made by another model.
        """
        return lm.load_memory(self.path) if (self.path / MEMORY_FILE).is_file() else lm.new_memory(1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing into the folder.

        Raises:
            SettingError: Another process is at it, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK_FILE).open("w")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        with file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass  # not on this system: no protection
            except BlockingIOError:
                raise SettingError(
                    "MEMORY", str(self.path), "another process is writing to it", "Wait until it is done."
                ) from None
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


def damaged(path: Path, file: str, error: Exception) -> SettingError:
    """The error for a file of the folder that cannot be understood."""
    problem = f"{file} is damaged ({type(error).__name__}: {error})"
    return SettingError("MEMORY", str(path), problem, "Ingest the documents into a new memory.")


def _others() -> str:
    names = sorted(file.parent.name for file in ROOT.glob(f"*/{FILE}")) if os.path.isdir(ROOT) else []
    known = f"There are: {', '.join(names)}. " if names else ""
    return f"{known}Make one with: lightning ingest NAME PATH…"
