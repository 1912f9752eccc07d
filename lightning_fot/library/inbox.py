"""Texts that were handed over to be read into a library: on disk until they have been, whatever is killed and when.

Each lies in the folder ``inbox`` of the memory as ``NUMBER.text`` and ``NUMBER.json``, which says what it is, has both
digests, and is written last. No file has a name that its giver chose.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_fot.data.text.parts import DocumentSource, Skipped, text_part
from lightning_fot.errors import SettingError
from lightning_fot.library.library import BusyError, cannot_write, damaged
from lightning_fot.system.digests import check_files, file_digest, read_sealed, write_sealed
from lightning_fot.system.files import lock, sync

FOLDER = "inbox"
_LOCK = ".lock"
_TEXT, _ABOUT, _PART = ".text", ".json", ".part"


@dataclass(frozen=True)
class Handed:
    """A text that waits to be read.

    Args:
        number: Its place in the order of coming.
        name: What it is to be called.
        digest: SHA-256 of its text.
        tokens: How many it has.
    """

    number: int
    name: str
    digest: str
    tokens: int


class Inbox:
    """The texts that wait beside a library; one process has it at a time.

    Args:
        path: The library's folder.

    Raises:
        BusyError: Another process has it.
        SettingError: The folder cannot be written, or a file in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._library = path
        self._folder = path / FOLDER
        try:
            self._folder.mkdir(exist_ok=True)
            held = lock(self._folder / _LOCK)
        except OSError as error:
            raise cannot_write(path, error) from error
        if held is None:
            raise BusyError("MEMORY", str(path), "another server takes its documents", "Send them there, or stop it.")
        self._held = held
        try:
            self.waiting = self._read()
            """What was there when it was opened, in order."""
        except BaseException:
            held.close()
            raise
        self._next = 1 + max((one.number for one in self.waiting), default=0)

    def close(self) -> None:
        """Gives it up; an empty folder is removed."""
        with suppress(OSError):
            if {file.name for file in self._folder.iterdir()} <= {_LOCK}:
                (self._folder / _LOCK).unlink(missing_ok=True)
                self._folder.rmdir()
        self._held.close()

    def _read(self) -> list[Handed]:
        found: list[Handed] = []
        for file in sorted(self._folder.glob(f"*{_ABOUT}")):
            try:
                about = read_sealed(file)
                one = Handed(**about["handed"])
                if self._file(one, _ABOUT) != file or not self._file(one, _TEXT).is_file():
                    raise ValueError("its text is missing")
                check_files(self._folder, {self._file(one, _TEXT).name: about["text"]})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise damaged(self._library, f"{FOLDER}/{file.name}", error, "Remove it.") from error
            found.append(one)
        known = {self._file(one, _TEXT) for one in found}
        # What a kill left of texts that nobody was told are kept.
        for pattern in (f"*{_TEXT}", f"*{_PART}"):
            for file in set(self._folder.glob(pattern)) - known:
                if file.is_file():
                    file.unlink(missing_ok=True)
        return sorted(found, key=lambda one: one.number)

    @contextmanager
    def part(self) -> Iterator[Path]:
        """A file to write a text into that may be added; it is gone at the end of the block if it was not."""
        path = self._folder / f"{secrets.token_hex(8)}{_PART}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def add(self, part: Path, name: str, digest: str, tokens: int) -> Handed:
        """Takes a text; when this returns it is kept, through a power cut too.

        Args:
            part: As :meth:`part` gave it.
            name: What it is to be called.
            digest: SHA-256 of its text.
            tokens: How many it has.

        Raises:
            SettingError: The disk is full, or the folder cannot be written.
        """
        one = Handed(self._next, name, digest, tokens)
        self._next += 1
        try:
            about: dict[str, Any] = {"handed": asdict(one), "text": file_digest(part)}
            sync(part)
            part.replace(self._file(one, _TEXT))
            write_sealed(self._file(one, _ABOUT), about)
        except OSError as error:
            self.remove(one)
            raise cannot_write(self._library, error) from error
        return one

    def remove(self, one: Handed) -> None:
        """Takes a text out; what is gone stays gone."""
        with suppress(OSError):
            self._file(one, _ABOUT).unlink(missing_ok=True)
            self._file(one, _TEXT).unlink(missing_ok=True)
            sync(self._folder)

    def source(self, one: Handed) -> DocumentSource:
        """The text, to be read.

        Raises:
            SettingError: It is gone.
        """
        skipped = Skipped()
        found = source_of(self._file(one, _TEXT), one.name, skipped)
        if found is None:
            raise SettingError("document", one.name, f"cannot be read any more ({skipped.text()})", "Send it again.")
        return found

    def _file(self, one: Handed, suffix: str) -> Path:
        return self._folder / f"{one.number:08d}{suffix}"


def source_of(path: Path, name: str, skipped: Skipped) -> DocumentSource | None:
    """A file as one document, whatever it is called.

    Args:
        path: The file.
        name: The document's name.
        skipped: Counts it where it holds no text.
    """
    part = text_part(path, skipped)
    return None if part is None else DocumentSource(name, (part,), f"upload:{name}")
