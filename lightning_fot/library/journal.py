"""The list of a library on disk: ``library.json``, and a journal of what has changed since it was written.

Writing the whole list for each document would cost more the more there are. So changes are added to
``library.journal``, a line each, and joined into ``library.json`` when a command ends. The journal names the list that
it belongs to, so that one which a kill left beside a newer list counts for nothing. Changes that go with one of the
memory are a line that counts once ``memory.json`` is no longer what it was. Both files hold digests: a line that a kill
cut short is the last one and is left out, any other change is told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_fot.system.digests import KEY, AlteredError, file_digest, json_digest, unsealed
from lightning_fot.system.files import append_bytes, json_text, write_text

FILE = "library.json"
JOURNAL = "library.journal"
MEMORY_FILE = "memory.json"
DOCUMENTS = "documents"
_LINE_DIGEST = 16
_READS = 20


def read_list(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The list, with what its journal says.

    Returns:
        What it holds beside documents; and documents by name, in order.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
        LookupError: It lacks something.
        TypeError, AttributeError: Something in it is of another type.
    """
    text, data = _read(folder)
    content = unsealed(folder / FILE, text)
    digest = json_digest(content)
    listed = content.pop(DOCUMENTS, [])
    documents = {document["name"]: document for document in listed}
    if len(documents) != len(listed):
        raise ValueError("two documents have one name")
    memory = None
    for line in _changes(folder / JOURNAL, data, digest):
        if "once" in line:
            memory = memory_digest(folder) if memory is None else memory
            if line["once"] == memory:
                continue
        for change in line["changes"] if "once" in line else (line,):
            if "put" in change:
                documents[change["put"]["name"]] = change["put"]
            else:
                documents.pop(change["drop"], None)
    return content, documents


def memory_digest(folder: Path) -> str:
    """What stands for the memory as it is saved in a folder; empty where none is.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return file_digest(folder / MEMORY_FILE)
    except FileNotFoundError:
        return ""


def write_list(folder: Path, content: Mapping[str, Any], documents: Iterable[Mapping[str, Any]]) -> str:
    """Writes the list as a whole and ends its journal; gives its digest.

    Raises:
        OSError: It cannot be written.
    """
    # As JSON has it: keys are text there, and the digest must not depend on what they were.
    kept, listed = json.loads(json_text(dict(content))), list(documents)
    digest = json_digest({**kept, DOCUMENTS: listed})
    # One document a line, by the fast encoder.
    lines = ",\n  ".join(map(json.dumps, listed))
    head = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
    write_text(folder / FILE, f'{{{head},\n "{DOCUMENTS}": [\n  {lines}\n ],\n "{KEY}": "{digest}"}}\n')
    (folder / JOURNAL).unlink(missing_ok=True)
    return digest


def append(folder: Path, digest: str, changes: Iterable[Mapping[str, Any]], durable: bool = False) -> None:
    """Adds changes to the journal of the list with that digest.

    Args:
        folder: Of the library.
        digest: As :func:`write_list` gave it.
        changes: ``{"put": document}`` or ``{"drop": name}``; or several in ``{"once": digest, "changes": […]}``, which
            count once :func:`memory_digest` is another one.
        durable: Whether they have to outlive a power cut that follows at once.

    Raises:
        OSError: They cannot be written; a part of them may have been.
    """
    path = folder / JOURNAL
    head = [] if path.exists() else [{"of": digest}]
    append_bytes(path, b"".join(map(_line, (*head, *changes))), durable)


def _read(folder: Path) -> tuple[str, bytes]:
    """The list and its journal, which belong together: a writer beside this process may join them meanwhile."""
    for _ in range(_READS):
        text = (folder / FILE).read_text(encoding="utf-8")
        try:
            data = (folder / JOURNAL).read_bytes()
        except FileNotFoundError:
            data = b""
        if (folder / FILE).read_text(encoding="utf-8") == text:
            break
    return text, data


def _line(change: Mapping[str, Any]) -> bytes:
    text = json.dumps(change)
    return f"{_line_digest(text)} {text}\n".encode()


def _changes(path: Path, data: bytes, digest: str) -> list[dict[str, Any]]:
    """Changes since the list with that digest was written.

    Raises:
        AlteredError: A line is not what was written.
    """
    *lines, rest = data.split(b"\n")
    # Behind the last line end stands what a kill cut short. What is longer than a line lost its end in another way.
    if _text(rest[:-1]) is not None:
        raise AlteredError(path)
    changes = []
    for line in lines:
        text = _text(line)
        if text is None:
            raise AlteredError(path)
        changes.append(json.loads(text))
    # One of another list was left by a kill.
    return changes[1:] if changes and changes[0]["of"] == digest else []


def _text(line: bytes) -> str | None:
    """The JSON of a line; None where it does not fit the line's digest."""
    written, _, text = line.decode("utf-8", "replace").partition(" ")
    return text if written == _line_digest(text) else None


def _line_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LINE_DIGEST]
