"""Token ids on disk: pieces of text as they were encoded, and whole documents too large to be kept in memory.

A file holds ids, int32, and then the SHA-256 of its key and of them. One that was cut short, altered or given another's
name counts as absent: what it held is encoded again. Files of versions before 0.2 (``.npy``, ``.int32``) have no digest
and are taken as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_fot.system.files import writing

Ids = npt.NDArray[np.int32]
_ID = np.dtype(np.int32).itemsize
_DIGEST = hashlib.sha256().digest_size
_BLOCK = 1 << 20


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_fot/tokens``, or the same under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(root).expanduser() / "lightning_fot" / "tokens"


class TokenCache:
    """Files of ids, named by a hash of what they were made from. May be used by several threads and processes.

    Args:
        folder: Where they are; None keeps nothing.
        report: Called once with a message when the folder cannot be written.
    """

    def __init__(self, folder: Path | None, report: Callable[[str], None] | None = None) -> None:
        self._folder = folder
        self._report = report
        # Documents that were compared with their digests, as the file system tells files apart.
        self._checked: set[tuple[str, int, int, int]] = set()

    def load(self, key: str) -> Ids | None:
        """A piece's ids, int32 (tokens,); None when they are not there, or are not what was written."""
        if self._folder is None:
            return None
        try:
            content = self._path(self._folder, f"{key}.piece").read_bytes()
        except OSError:
            return self._load_old(self._folder, key)
        ids, written = content[:-_DIGEST], content[-_DIGEST:]
        if len(ids) % _ID or hashlib.sha256(key.encode() + ids).digest() != written:
            return None  # cut short by a full disk, or altered: encode again
        return np.frombuffer(ids, np.int32)

    def _load_old(self, folder: Path, key: str) -> Ids | None:
        try:
            loaded = np.load(self._path(folder, f"{key}.npy"), allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, MemoryError):
            return None
        return np.asarray(loaded, np.int32) if loaded.dtype == np.int32 and loaded.ndim == 1 else None

    def store(self, key: str, ids: Ids) -> None:
        """Keep a piece's ids."""
        self._write(f"{key}.piece", lambda: [ids])

    def load_document(self, key: str) -> Ids | None:
        """A document's ids, read from disk as they are used: int32 (tokens,); None when they are not there."""
        if self._folder is None:
            return None
        path = self._path(self._folder, f"{key}.document")
        try:
            if not path.is_file():
                return np.memmap(self._path(self._folder, f"{key}.int32"), np.int32, mode="r")
            tokens, rest = divmod(path.stat().st_size - _DIGEST, _ID)
            if rest or tokens < 0 or not self._is_whole(path, key, _ID * tokens):
                return None
            return np.memmap(path, np.int32, mode="r", shape=(tokens,)) if tokens else np.empty(0, np.int32)
        except (OSError, ValueError):
            return None

    def _is_whole(self, path: Path, key: str, length: int) -> bool:
        """Whether the file's key and first bytes have the digest that follows; each file is read once for it."""
        state = path.stat()
        seen = (str(path), state.st_ino, state.st_size, state.st_mtime_ns)
        if seen in self._checked:
            return True
        digest = hashlib.sha256(key.encode())
        with path.open("rb") as file:
            while length and (block := file.read(min(length, _BLOCK))):
                digest.update(block)
                length -= len(block)
            whole = digest.digest() == file.read()
        if whole:
            self._checked.add(seen)
        return whole

    def store_document(self, key: str, parts: Callable[[], Iterable[Ids]]) -> Ids | None:
        """Write a document part by part, and give it as ``load_document`` does; None when it cannot be written."""
        self._write(f"{key}.document", parts)
        return self.load_document(key)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / name[:2] / name

    def _write(self, name: str, parts: Callable[[], Iterable[Ids]]) -> None:
        """Writes a file whole: no reader ever sees half of it."""
        folder = self._folder
        if folder is None:
            return
        try:
            # After a power cut it may be missing or wrong, and then it is made again.
            with writing(self._path(folder, name), durable=False) as fresh, fresh.open("wb") as file:
                digest = hashlib.sha256(Path(name).stem.encode())
                for part in parts():
                    content = np.ascontiguousarray(part, np.int32).data
                    digest.update(content)
                    file.write(content)
                file.write(digest.digest())
        except OSError as error:
            # Threads may come here together: only the first one says so.
            said, self._folder = self._folder is None, None
            if self._report is not None and not said:
                self._report(f"Tokens are not cached: {folder} cannot be written ({error.strerror or error}).")
