"""The list of a library on disk: ``library.json``, and a journal of what has changed since it was written.

Writing the whole list for each document would cost more the more there are. So changes are added to
``library.journal``, a line each, and joined into ``library.json`` when a command ends. The journal names the list that
it belongs to, so that one which a kill left beside a newer list counts for nothing. Both hold digests: a line that a
kill cut short is the last one and is left out, any other change is told.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_fot.system.files import write_text

FILE = "library.json"
JOURNAL = "library.journal"
# Of the list's digest, among its keys.
KEY = "sha256"
DOCUMENTS = "documents"
_LINE_DIGEST = 16


class ListError(ValueError):
    """The list or its journal is not what was written."""


def read_list(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], bool]:
    """The list, with what its journal says.

    Returns:
        What it holds beside documents; documents by name, in order; and whether there is a journal.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
        KeyError: It lacks something.
    """
    content = _object((folder / FILE).read_text(encoding="utf-8"), FILE)
    written = content.pop(KEY, None)
    digest = _digest(content)
    # Lists of format 1 have none.
    if written is not None and written != digest:
        raise ListError(f"{FILE} was altered since it was written")
    listed = content.pop(DOCUMENTS, [])
    documents = {str(document["name"]): dict(document) for document in listed}
    if len(documents) != len(listed):
        raise ListError("two documents have one name")
    lines = _journal(folder / JOURNAL, digest)
    for change in lines or ():
        if "put" in change:
            documents[str(change["put"]["name"])] = change["put"]
        else:
            documents.pop(change["drop"], None)
    return content, documents, lines is not None


def write_list(folder: Path, content: Mapping[str, Any], documents: Iterable[Mapping[str, Any]]) -> str:
    """Writes the list as a whole and ends its journal; gives its digest.

    Raises:
        OSError: It cannot be written.
    """
    listed = list(documents)
    digest = _digest({**content, DOCUMENTS: listed})
    # One document a line, by the fast encoder.
    lines = ",\n  ".join(json.dumps(document) for document in listed)
    head = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    body = f'{{{head},\n "{DOCUMENTS}": [\n  {lines}\n ],\n "{KEY}": "{digest}"}}\n'
    write_text(folder / FILE, body)
    (folder / JOURNAL).unlink(missing_ok=True)
    return digest


def append(folder: Path, digest: str, changes: Iterable[Mapping[str, Any]], durable: bool = False) -> None:
    """Adds changes to the journal of the list with that digest.

    Args:
        folder: Of the library.
        digest: As :func:`write_list` gave it.
        changes: ``{"put": document}`` or ``{"drop": name}``.
        durable: Whether they have to outlive a power cut that follows at once.

    Raises:
        OSError: They cannot be written.
    """
    path = folder / JOURNAL
    with path.open("ab") as file:
        lines = [_line({"of": digest})] if not file.tell() else []
        lines += [_line(change) for change in changes]
        file.write(b"".join(lines))
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _line(change: Mapping[str, Any]) -> bytes:
    text = json.dumps(change)
    return f"{_text_digest(text)} {text}\n".encode()


def _journal(path: Path, digest: str) -> list[dict[str, Any]] | None:
    """Changes since the list with that digest was written; None where there is no journal."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    changes = []
    # What stands behind the last line end was cut short by a kill.
    for line in data.split(b"\n")[:-1]:
        written, _, text = line.decode("utf-8", "replace").partition(" ")
        if written != _text_digest(text):
            raise ListError(f"{path.name} was altered since it was written")
        changes.append(_object(text, path.name))
    if not changes or changes[0].get("of") != digest:
        return []
    return changes[1:]


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ListError(f"{name} is nested too deeply") from None
    if not isinstance(found, dict):
        raise ListError(f"{name} holds no JSON object")
    return found


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_LINE_DIGEST]


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
