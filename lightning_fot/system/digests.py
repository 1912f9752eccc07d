"""Digests in files, by which a change is told: of JSON, of safetensors, of ids, and of zip archives by their CRC-32.

Files of versions that wrote none are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fot.system.files import json_text, write_text

KEY = "sha256"
TENSORS_KEY = "lightning_fot_sha256"
_BLANK = "0" * 64
_CHUNK = 1 << 20
# As the library itself allows.
_LONGEST_HEADER = 100_000_000


class AlteredError(ValueError):
    """A file is not what was written."""

    def __init__(self, path: Path, how: str = "was altered since it was written") -> None:
        super().__init__(f"{path.name} {how}")
        self.path = path


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON holds of ``content``, and its digest, which does not depend on spaces and the order of keys."""
    kept = {key: value for key, value in json.loads(json_text(dict(content))).items() if key != KEY}
    return {**kept, KEY: json_digest(kept)}


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with its digest, as a whole or not at all."""
    write_text(path, json_text(sealed(content)))


def read_sealed(path: Path) -> dict[str, Any]:
    """JSON that :func:`write_sealed` wrote, without its digest.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON object, or was altered.
    """
    return unsealed(path, path.read_text(encoding="utf-8"))


def unsealed(path: Path, text: str) -> dict[str, Any]:
    """As :func:`read_sealed`, of text that was read.

    Raises:
        ValueError: It is no JSON object, or was altered.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    if KEY not in content:
        # Written by an older version, unless the name of the digest is what was altered.
        if content and _is_digest(next(reversed(content.values()))):
            raise AlteredError(path)
        return content
    if content.pop(KEY) != json_digest(content):
        raise AlteredError(path)
    return content


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def json_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON holds, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(folder: Path, digests: Mapping[str, Any]) -> None:
    """Compares files with the digests that a settings file has of them.

    Raises:
        AlteredError: One is missing or differs.
    """
    for name, written in digests.items():
        path = folder / Path(str(name)).name
        if not path.is_file():
            raise AlteredError(path, "is missing")
        if file_digest(path) != written:
            raise AlteredError(path)


def blank_metadata(metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Metadata of a safetensors file that :func:`seal_tensors` is to fill in."""
    return {**(metadata or {}), TENSORS_KEY: _BLANK}


def seal_tensors(path: Path) -> None:
    """Writes into a safetensors file the digest of all its bytes, itself taken as zeros.

    Args:
        path: Was saved with :func:`blank_metadata`.
    """
    place = _place_of_digest(path)
    assert place is not None
    digest = _digest_around(path, place[0])
    with path.open("r+b") as stream:
        stream.seek(place[0])
        stream.write(digest.encode())


def check_tensors(path: Path) -> None:
    """Compares a safetensors file with its digest, where it has one.

    Raises:
        OSError: It cannot be read.
        AlteredError: It differs.
    """
    place = _place_of_digest(path)
    if place is not None and _digest_around(path, place[0]) != place[1]:
        raise AlteredError(path)


def _place_of_digest(path: Path) -> tuple[int, str] | None:
    """Where the digest stands, and what it says; None where there is none, or no header that can be read."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LONGEST_HEADER:
            return None
        header = stream.read(length)
    try:
        metadata = dict(json.loads(header)["__metadata__"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if TENSORS_KEY not in metadata:
        if any(map(_is_digest, metadata.values())):
            raise AlteredError(path)
        return None
    written = metadata[TENSORS_KEY]
    place = header.find(f'"{TENSORS_KEY}":"{written}"'.encode(errors="replace"))
    if place < 0 or not isinstance(written, str) or len(written) != len(_BLANK):
        raise AlteredError(path)
    return 8 + place + len(TENSORS_KEY) + 4, written


def _digest_around(path: Path, place: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(place))
        digest.update(_BLANK.encode())
        stream.seek(place + len(_BLANK))
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_zip(path: Path) -> None:
    """Compares the members of a zip archive with their CRC-32, which torch writes and does not look at.

    Raises:
        OSError: It cannot be read.
        AlteredError: It is no archive, or was altered.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise AlteredError(path, f"is damaged ({error})") from error
    if wrong is not None:
        raise AlteredError(path)
