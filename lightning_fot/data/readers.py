"""Find documents in files and folders, and read their text.

Only the standard library is imported here, so a wrong path is reported before torch or a model is loaded.

What is one document:

- a text file (``.txt``, ``.md``, ``.rst``, ``.tex``, or any text of unknown suffix): the file;
- source code: the files of one folder, sorted by name and joined, a header line before each;
- ``.jsonl``: each line, its text under one field;
- no paths at all: the standard library's sources of the running interpreter, see ``standard_library``.

Hidden files, version control and cache folders are left out. A file is *binary*, and skipped, when it holds a NUL byte
or is not UTF-8 (a byte-order mark is tolerated, and one of UTF-16 is obeyed).
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "site-packages", "dist-packages", "CVS"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_GENERATED = re.compile(rb"(?i)auto-?generated|generated from|gencodec|do not edit")

SNIFFED_BYTES = 64 * 1024
BLOCK_BYTES = 8 * 1024 * 1024
LARGE_FILE_BYTES = 100 * 1024 * 1024
_LONG_MODULE_BYTES = 16 * 1024
_JOINED_MODULES_BYTES = 64 * 1024


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
    def path_key(self) -> str:
        """The file itself, whatever links lead to it."""
        return os.path.realpath(self.path)

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


def find_documents(
    paths: Sequence[str] | None,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    setting: str = "data.paths",
) -> Found:
    """List the documents under ``paths`` in a fixed order, whatever the file system's order is.

    Args:
        paths: Files and folders; None takes the standard library's sources.
        text_field: Key of the text in ``.jsonl`` objects.
        max_documents: From a ``.jsonl`` file of more than 100 MB only so many lines are looked at.
        setting: Name of the setting in errors.

    Raises:
        SettingError: A path is missing, a ``.jsonl`` line is bad, or no document is left.
    """
    if paths is None:
        return standard_library()
    if not paths:
        raise SettingError(setting, list(paths), "names no file or folder", "Name some, or leave the setting out.")
    found = Found()
    seen: set[tuple[int, int]] = set()
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            problem = "is a broken link" if path.is_symlink() else "does not exist"
            raise SettingError(setting, given, problem, f"Paths are relative to {os.getcwd()}; correct it.")
        if path.is_dir():
            for folder, files in _walk(path, seen, found.skipped):
                name = "" if folder == path else folder.relative_to(path).as_posix()
                _read_folder(
                    found, files, f"{path.name or given}/{name}".rstrip("/"), text_field, max_documents, setting
                )
        elif path.is_file():
            if _is_new(path, seen):
                _read_file(found, path, path.name, text_field, max_documents, setting)
        else:
            raise SettingError(setting, given, "is neither a file nor a folder", "Name text files or folders of them.")
    if not found.documents:
        why = found.skipped_text() or "there are no files in it"
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
        "Add longer documents, or lower data.min_tokens or model.memory.window.",
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
    for folder, files in _walk(base, set(), found.skipped, without=_TEST_FOLDERS):
        for path in files:
            if path.suffix != ".py":
                continue
            relative = path.relative_to(base)
            part = _text_part(path, found.skipped, header=f"# file: {relative.as_posix()}\n", generated=True)
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


def _walk(
    root: Path, seen: set[tuple[int, int]], skipped: Counter[str], without: Iterable[str] = ()
) -> Iterator[tuple[Path, list[Path]]]:
    """Folders below ``root`` with their files, sorted. Links are followed, and nothing is visited twice."""
    if not _is_new(root, seen):
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
            elif entry.is_file() and _is_new(path, seen):
                files.append(path)
        except OSError:
            skipped["unreadable"] += 1
    yield root, files
    for folder in folders:
        yield from _walk(folder, seen, skipped, without)


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether the file or folder behind ``path`` was not seen yet (by inode: a link and its target are one file)."""
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    if status.st_ino and key in seen:
        return False
    seen.add(key)
    return True


def _read_folder(
    found: Found, files: list[Path], name: str, text_field: str, max_documents: int | None, setting: str
) -> None:
    code = []
    for path in files:
        if path.suffix.lower() in SOURCE_SUFFIXES:
            part = _text_part(path, found.skipped, header=f"# file: {name}/{path.name}\n")
            if part is not None:
                code.append(part)
        else:
            _read_file(found, path, f"{name}/{path.name}", text_field, max_documents, setting)
    if code:
        found.documents.append(DocumentSource(name, tuple(code)))


def _read_file(found: Found, path: Path, name: str, text_field: str, max_documents: int | None, setting: str) -> None:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        _read_jsonl(found, path, name, text_field, max_documents, setting)
        return
    part = _text_part(path, found.skipped)
    if part is not None:
        found.documents.append(DocumentSource(name, (part,)))


def _text_part(path: Path, skipped: Counter[str], header: str = "", generated: bool = False) -> FilePart | None:
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


def _read_jsonl(found: Found, path: Path, name: str, text_field: str, max_documents: int | None, setting: str) -> None:
    """One document a line. Every line is parsed now: a bad one must not stop a training run hours later."""
    limit = max_documents if path.stat().st_size > LARGE_FILE_BYTES else None
    offset = count = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise _bad_line(setting, path, number, f"is not JSON ({error})", "Correct or remove it.") from None
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                keys = f"; its keys are {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else ""
                fix = "Set data.text_field to the key that holds the text."
                raise _bad_line(setting, path, number, f"has no text under the key {text_field!r}{keys}", fix)
            if not record[text_field].strip():
                found.skipped["empty"] += 1
                continue
            part = FilePart(str(path), len(line), offset=start, field=text_field)
            found.documents.append(DocumentSource(f"{name}:{number}", (part,)))
            count += 1
            if limit is not None and count >= limit:
                return
    if not count:
        found.skipped["empty"] += 1


def _bad_line(setting: str, path: Path, number: int, problem: str, fix: str) -> SettingError:
    return SettingError(setting, str(path), f"line {number} {problem}", fix)
