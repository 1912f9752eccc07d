"""Find documents in files and folders, and read their text.

Only the standard library is imported here, so a wrong path is reported before torch or a model is loaded.

What is one document:

- a text file (``.txt``, ``.md``, ``.rst``, ``.tex``, or any text of unknown suffix): the file;
- source code: the files of one folder, sorted by name and joined, a header line before each;
- ``.jsonl``: each line, its text under one field;
- no paths at all: the standard library's sources of the running interpreter, see ``standard_library``.

Hidden files, version control and cache folders are left out. A file is *binary*, and skipped, when it holds a NUL or
is not UTF-8 (a byte-order mark is tolerated, and one of UTF-16 or UTF-32 is obeyed).
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fot.data.text.parts import (
    EMPTY,
    LARGE_FILE_BYTES,
    UNREADABLE,
    DocumentSource,
    FilePart,
    Found,
    check_text,
    decode_line,
    encoding_of,
    is_new,
    leave_out,
    lines_of,
    readable,
    text_part,
    walk,
)
from lightning_fot.errors import SettingError

SOURCE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("py", "pyi", "pyx", "c", "h", "cc", "cpp", "cxx", "hh", "hpp", "cu", "cuh", "m", "mm", "js", "jsx", "mjs"),
        *("ts", "tsx", "rs", "go", "java", "kt", "scala", "swift", "cs", "fs", "rb", "php", "pl", "lua", "r", "jl"),
        *("sh", "bash", "sql", "hs", "ml", "mli", "ex", "exs", "erl", "clj", "lisp", "el", "vim", "thy", "lean", "v"),
        *("f90", "f", "asm", "s", "cmake", "toml", "yaml", "yml"),
    )
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_LIKE_A_LINE = re.compile(r"(?i)\.(jsonl|ndjson):\d+$")
_LONG_MODULE_BYTES = 16 * 1024
_JOINED_MODULES_BYTES = 64 * 1024


def find_documents(
    paths: Sequence[str] | None,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    setting: str = "data.paths",
    lenient: bool = False,
) -> Found:
    """List the documents under ``paths`` in a fixed order, whatever the file system's order is.

    Args:
        paths: Files and folders; None takes the standard library's sources.
        text_field: Key of the text in ``.jsonl`` objects.
        max_documents: From a ``.jsonl`` file of more than 100 MB only so many lines are looked at.
        setting: Name of the setting in errors.
        lenient: Leave bad ``.jsonl`` lines out, by name, instead of refusing them.

    Raises:
        SettingError: A path is missing, a ``.jsonl`` line is bad, or no document is left.
    """
    if paths is None:
        return standard_library()
    if not paths:
        raise SettingError(setting, list(paths), "names no file or folder", "Name some, or leave the setting out.")
    found = Found()
    reader = _Reader(found, text_field, max_documents, setting, lenient)
    seen: set[tuple[int, int]] = set()
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            problem = "is a broken link" if path.is_symlink() else "does not exist"
            raise SettingError(setting, given, problem, f"Paths are relative to {os.getcwd()}; correct it.")
        if path.is_dir():
            for folder, files in walk(path, seen, found.skipped):
                name = "" if folder == path else folder.relative_to(path).as_posix()
                reader.folder(folder, files, readable(f"{path.name or given}/{name}".rstrip("/")))
        elif path.is_file():
            if is_new(path, seen):
                reader.file(path, readable(path.name))
        else:
            raise SettingError(setting, given, "is neither a file nor a folder", "Name text files or folders of them.")
    if not found.documents:
        why = found.skipped_text(named=True) or "there are no files in it"
        raise SettingError(
            setting, list(paths), f"holds no text ({why})", "Use .txt, .md, source or .jsonl files in UTF-8."
        )
    return found


def check_paths(
    paths: Sequence[str] | str | None,
    *,
    min_tokens: int = 1,
    text_field: str = "text",
    max_documents: int | None = None,
    setting: str = "data.paths",
) -> None:
    """Check what can be known about ``paths`` without a tokenizer.

    Args:
        paths: As given to ``find_documents``; None needs no check.
        min_tokens: A document must have so many tokens; one with fewer bytes cannot.
        text_field: Key of the text in ``.jsonl`` objects.
        max_documents: As given to ``find_documents``.
        setting: Name of the setting in errors.

    Raises:
        SettingError: A path is missing, nothing is text, or every document is surely too short.
    """
    if paths is None:
        return
    listed = [paths] if isinstance(paths, str) else paths
    found = find_documents(listed, text_field=text_field, max_documents=max_documents, setting=setting)
    longest = max(found.documents, key=lambda source: source.size)
    if longest.size + 1 < min_tokens:
        raise too_short(setting, listed, len(found.documents), min_tokens, f"the longest has {longest.size:,} bytes")


def too_short(setting: str, value: object, count: int, min_tokens: int, detail: str) -> SettingError:
    """The error for a corpus without one document that is long enough."""
    return SettingError(
        setting,
        value,
        f"no document has {min_tokens:,} tokens ({count:,} found, {detail})",
        f"Add longer documents, or lower {setting.rpartition('.')[0]}.min_tokens or model.memory.window.",
    )


def standard_library(root: str | None = None) -> Found:
    """The running interpreter's own library as documents: real code, on every machine, without a download.

    A package with its subpackages is one document, files sorted, a header line before each. A single module of 16 kB or
    more is a document; shorter ones are joined in alphabetical order to documents of about 64 kB. Left out: test
    packages, third-party packages, and generated files (character maps, documentation topics).

    Args:
        root: Folder of the library; None takes the running interpreter's.
    """
    base = Path(root or sysconfig.get_paths()["stdlib"])
    found = Found()
    packages: dict[str, list[FilePart]] = {}
    modules: list[FilePart] = []
    for folder, files in walk(base, set(), found.skipped, without=_TEST_FOLDERS):
        for path in files:
            if path.suffix != ".py":
                continue
            relative = path.relative_to(base)
            part = text_part(path, found.skipped, header=f"# file: {relative.as_posix()}\n", generated=True)
            if part is None:
                continue
            if folder == base:
                modules.append(part)
            else:
                packages.setdefault(relative.parts[0], []).append(part)
    for name, parts in packages.items():
        found.documents.append(DocumentSource(name, tuple(parts)))
    joined: list[FilePart] = []
    for part in modules:
        if part.size >= _LONG_MODULE_BYTES:
            found.documents.append(DocumentSource(Path(part.path).name, (part,)))
            continue
        joined.append(part)
        if sum(one.size for one in joined) >= _JOINED_MODULES_BYTES:
            found.documents.append(_joined_modules(joined))
            joined = []
    if joined:
        found.documents.append(_joined_modules(joined))
    found.documents.sort(key=lambda source: source.name)
    return found


def _joined_modules(parts: list[FilePart]) -> DocumentSource:
    return DocumentSource(f"{Path(parts[0].path).name} … {Path(parts[-1].path).name}", tuple(parts))


@dataclass
class _Reader:
    """Turns files into documents."""

    found: Found
    text_field: str
    max_documents: int | None
    setting: str
    lenient: bool

    def folder(self, folder: Path, files: list[Path], name: str) -> None:
        code = []
        for path in files:
            own = f"{name}/{readable(path.name)}"
            if path.suffix.lower() in SOURCE_SUFFIXES:
                part = text_part(path, self.found.skipped, header=f"# file: {own}\n")
                if part is not None:
                    code.append(part)
            else:
                self.file(path, own)
        if code:
            self.found.documents.append(DocumentSource(name, tuple(code), place_of(folder)))

    def file(self, path: Path, name: str) -> None:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            try:
                self._jsonl(path, name)
            except OSError:
                leave_out(self.found.skipped, UNREADABLE, readable(str(path)))
            return
        part = text_part(path, self.found.skipped)
        if part is not None:
            self.found.documents.append(DocumentSource(name, (part,), place_of(path)))

    def _jsonl(self, path: Path, name: str) -> None:
        """One document a line. Every line is parsed now: a bad one must not stop a training run hours later."""
        limit = self.max_documents if path.stat().st_size > LARGE_FILE_BYTES else None
        offset = count = 0
        place = place_of(path)
        with open(path, "rb") as file:
            encoding = encoding_of(file.read(4))
            file.seek(0)
            for number, line in enumerate(lines_of(file, encoding), start=1):
                start, offset = offset, offset + len(line)
                try:
                    text = self._text(line, encoding)
                except _BadLineError as error:
                    if not self.lenient:
                        raise SettingError(
                            self.setting, str(path), f"line {number} {error.problem}", error.fix
                        ) from None
                    leave_out(self.found.skipped, error.reason, f"{name}:{number}")
                    continue
                if text is None:
                    continue
                if not text.strip():
                    leave_out(self.found.skipped, EMPTY, f"{name}:{number}")
                    continue
                part = FilePart(str(path), len(line), offset=start, field=self.text_field, encoding=encoding)
                self.found.documents.append(DocumentSource(f"{name}:{number}", (part,), f"{place}:{number}"))
                count += 1
                if limit is not None and count >= limit:
                    return
        if not offset:
            leave_out(self.found.skipped, EMPTY, readable(str(path)))

    def _text(self, line: bytes, encoding: str) -> str | None:
        """The text of a line; None where there is nothing on it.

        Raises:
            _BadLineError: It is no object with a text.
        """
        if not line.strip():
            return None
        fix = "Correct or remove it."
        try:
            written = decode_line(line, encoding)
            if not written.strip():
                return None
            record = json.loads(written)
        except RecursionError:
            raise _BadLineError("is nested too deeply", fix, "lines nested too deeply") from None
        except ValueError as error:
            raise _BadLineError(f"is not JSON ({error})", fix, "lines that are not JSON") from None
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = f"; its keys are {_listed(record) or 'none'}" if isinstance(record, dict) else ""
            section = self.setting.rpartition(".")[0]
            fix = f"Set {section}.text_field to the key that holds the text." if section else "Give it that key."
            problem = f"has no text under the key {self.text_field!r}"
            raise _BadLineError(f"{problem}{keys}", fix, f"lines without a text under {self.text_field!r}")
        try:
            check_text(text)
        except UnicodeError as error:
            raise _BadLineError(f"is no text ({error})", fix, "lines with a NUL or half a surrogate pair") from None
        return text


class _BadLineError(Exception):
    """A line of ``.jsonl`` that cannot be read: what is wrong, what helps, and what such lines are counted as."""

    def __init__(self, problem: str, fix: str, reason: str) -> None:
        super().__init__(problem)
        self.problem, self.fix, self.reason = problem, fix, reason


def _listed(record: dict[str, Any]) -> str:
    """Keys, the first few of them."""
    names = sorted(record)
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def place_of(path: Path) -> str:
    """Where a file or folder stands, whatever links lead to it.

    A file that is named like a line of a ``.jsonl`` file gets a separator behind, as no such line has.
    """
    place = readable(os.path.realpath(path))
    return place + os.sep if _LIKE_A_LINE.search(place) else place
