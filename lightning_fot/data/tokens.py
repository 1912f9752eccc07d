"""Text to token ids: in pieces, only as far as they are needed, and cached on disk by content."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

PIECE_CHARACTERS = 256 * 1024
_CACHED_CHARACTERS = 4 * 1024
_MOST_CHARACTERS_A_TOKEN = 32
# Byte-level BPE splits text into words first: no token reaches across these places (before the space between two words;
# between two lines that end and start with a character), so pieces cut there have the tokens of the whole.
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\S)")
_PROBES = (("one", " two"), ("one\n", "two"))


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_fot/tokens``, or the same under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(root).expanduser() / "lightning_fot" / "tokens"


class TextEncoder:
    """Encodes long texts with a Hugging Face tokenizer, without special tokens.

    Text is cut into pieces at line ends where that changes no token; tokenizers that mark the start of a text
    (SentencePiece's leading space) get the text whole. Control tokens that a document spells out, such as
    ``<|endoftext|>``, are encoded as plain text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        cache_dir: Folder for the ids of pieces, keyed by content and tokenizer; None keeps nothing on disk.
        report: Called once with a message when the cache cannot be written.
    """

    def __init__(
        self, tokenizer: Any, cache_dir: Path | None = None, report: Callable[[str], None] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._cache_dir = cache_dir
        self._report = report
        self._fingerprint = _fingerprint(tokenizer)
        self._pieces_agree = all(self._ids(a) + self._ids(b) == self._ids(a + b) for a, b in _PROBES)

    def encode(self, texts: Iterable[str], max_tokens: int | None = None) -> tuple[Ids, bool]:
        """Ids of the joined ``texts``, and whether text was left when ``max_tokens`` was reached.

        Args:
            texts: A document's text in order; nothing is taken from it once the limit is reached.
            max_tokens: Ids returned at most; None encodes everything.

        Returns:
            Ids, int32 of shape (tokens,), and True when the text was cut.
        """
        parts: list[Ids] = []
        count = 0
        cut = False
        pieces = self._cut if self._pieces_agree else self._whole
        for piece in pieces(texts, max_tokens):
            if max_tokens is not None and count >= max_tokens:
                cut = True
                break
            ids = self._cached(piece)
            parts.append(ids)
            count += len(ids)
        joined = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if max_tokens is not None and len(joined) > max_tokens:
            joined, cut = joined[:max_tokens], True
        return joined, cut

    def stream(self, texts: Iterable[str]) -> Iterator[Ids]:
        """Ids of the joined ``texts`` in parts of some 100k tokens, int32 (n,), as :meth:`encode` would give them."""
        for piece in (self._cut if self._pieces_agree else self._whole)(texts, None):
            yield self._cached(piece)

    def _cut(self, texts: Iterable[str], max_tokens: int | None) -> Iterator[str]:
        # Pieces fit what is asked for (4 characters a token is usual), so that 8k tokens of a book cost about 8k.
        size = PIECE_CHARACTERS
        if max_tokens is not None:
            size = min(size, max(_CACHED_CHARACTERS, 6 * max_tokens))
        waiting = ""
        for text in texts:
            waiting += text
            start = 0
            while len(waiting) - start > 2 * size:
                match = _CUT.search(waiting, start + size, start + 2 * size)
                # Text without words or lines is cut anywhere: a token or two differ from the whole.
                end = start + 2 * size if match is None else match.end()
                yield waiting[start:end]
                start = end
            waiting = waiting[start:]
        if waiting:
            yield waiting

    def _whole(self, texts: Iterable[str], max_tokens: int | None) -> Iterator[str]:
        """The text as one piece, but for what lies beyond all that ``max_tokens`` could need."""
        if max_tokens is None:
            yield "".join(texts)
            return
        size = _MOST_CHARACTERS_A_TOKEN * max_tokens
        waiting = ""
        for text in texts:
            waiting += text
            while len(waiting) > size:
                yield waiting[:size]
                waiting = waiting[size:]
        if waiting:
            yield waiting

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _cached(self, piece: str) -> Ids:
        if self._cache_dir is None or len(piece) < _CACHED_CHARACTERS:
            return np.asarray(self._ids(piece), np.int32)
        content = hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=20, key=self._fingerprint)
        name = content.hexdigest()
        path = self._cache_dir / name[:2] / f"{name}.npy"
        try:
            loaded = np.load(path, allow_pickle=False)
            if loaded.dtype == np.int32 and loaded.ndim == 1:
                return np.asarray(loaded, np.int32)
        except (OSError, ValueError, EOFError):
            pass  # absent, or cut short by a crash or a full disk: encode again
        ids = np.asarray(self._ids(piece), np.int32)
        self._store(path, ids)
        return ids

    def _store(self, path: Path, ids: Ids) -> None:
        """Write under another name and rename, so that no reader ever sees half a file."""
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, ids, allow_pickle=False)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            if self._report is not None:
                self._report(f"Tokens are not cached: {self._cache_dir} cannot be written ({error.strerror or error}).")
            self._cache_dir = None


def _fingerprint(tokenizer: Any) -> bytes:
    """Hash of everything that decides a tokenizer's ids, at most 64 bytes (a key for blake2b)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = backend.to_str()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        described = repr((type(tokenizer).__name__, vocabulary))
    return hashlib.blake2b(described.encode("utf-8", "surrogatepass"), digest_size=32).digest()
