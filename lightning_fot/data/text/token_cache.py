"""Token ids on disk: pieces of text as they were encoded, and whole documents too large to be kept in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


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

    def load(self, key: str) -> Ids | None:
        """A piece's ids, int32 (tokens,); None when they are not there."""
        if self._folder is None:
            return None
        try:
            loaded = np.load(self._path(self._folder, f"{key}.npy"), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None  # absent, or cut short by a crash or a full disk: encode again
        return np.asarray(loaded, np.int32) if loaded.dtype == np.int32 and loaded.ndim == 1 else None

    def store(self, key: str, ids: Ids) -> None:
        """Keep a piece's ids."""
        self._write(f"{key}.npy", lambda file: np.save(file, ids, allow_pickle=False))

    def load_document(self, key: str) -> Ids | None:
        """A document's ids, read from disk as they are used: int32 (tokens,); None when they are not there."""
        if self._folder is None:
            return None
        try:
            return np.memmap(self._path(self._folder, f"{key}.int32"), np.int32, mode="r")
        except (OSError, ValueError):
            return None

    def store_document(self, key: str, parts: Callable[[], Iterable[Ids]]) -> Ids | None:
        """Write a document part by part, and give it as ``load_document`` does; None when it cannot be written."""

        def write(file: BinaryIO) -> None:
            for part in parts():
                file.write(np.ascontiguousarray(part, np.int32).data)

        self._write(f"{key}.int32", write)
        return self.load_document(key)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / name[:2] / name

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write under another name and rename, so that no reader ever sees half a file."""
        folder = self._folder
        if folder is None:
            return
        path, temporary = self._path(folder, name), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(descriptor, "wb") as file:
                write(file)
            os.replace(temporary, path)
            temporary = None
        except OSError as error:
            # Threads may come here together: only the first one says so.
            said, self._folder = self._folder is None, None
            if self._report is not None and not said:
                self._report(f"Tokens are not cached: {folder} cannot be written ({error.strerror or error}).")
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
