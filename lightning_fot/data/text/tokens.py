"""Text to token ids: in pieces, in parallel, only as far as they are needed, and cached on disk by content."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lightning_fot.data.text.token_cache import Ids as Ids
from lightning_fot.data.text.token_cache import TokenCache
from lightning_fot.data.text.token_cache import default_cache_dir as default_cache_dir
from lightning_fot.errors import SettingError

PIECE_CHARACTERS = 256 * 1024
_CACHED_CHARACTERS = 4 * 1024
_MOST_CHARACTERS_A_TOKEN = 32
_LINE_END = r"(?<=\S\n)(?=\S)"
# Byte-level BPE splits text into words first: no token reaches across these places (before the space between two words;
# between two lines that end and start with a character), so pieces cut there have the tokens of the whole.
_WORD_OR_LINE = re.compile(rf"(?<=[A-Za-z])(?= [A-Za-z])|{_LINE_END}")
_LINE = re.compile(_LINE_END)
_LINE_OR_EMPTY_LINE = re.compile(r"(?<=\n)(?=\S)")
_PROBES = (("one", " two"), ("one\n", "two"))
_LINE_PROBES = (("one\n", "two"), ("x = 1;\n", "}"), ("The end.\n", "A 字"))
_EMPTY_LINE_PROBES = (("one\n\n", "two"), ("x;\n\n\n", "}"), ("x \n \n", "A 字"))
_COPY_PROBE = "One  two\n\tthree</s><|endoftext|> 4字."
_MOST_THREADS = 8

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that a model knows.

    Args:
        model: Its name, for the error.
        size: Ids from 0 to ``size - 1`` are known; None knows no limit.
    """

    model: str
    size: int | None = None

    def check(self, ids: Ids) -> Ids:
        """``ids`` themselves.

        Raises:
            SettingError: One of them is not the model's.
        """
        if self.size is not None and len(ids) and int(ids.max()) >= self.size:
            raise SettingError(
                "model.backbone",
                self.model,
                f"its tokenizer gives token {int(ids.max()):,}, but the model knows only {self.size:,} (0 to "
                f"{self.size - 1:,})",
                "Put the tokenizer that the model was trained with into its folder.",
            )
        return ids


class TextEncoder:
    """Encodes long texts with a Hugging Face tokenizer, without special tokens.

    Text is cut into pieces where that changes no token, and pieces are encoded in threads: the tokenizers of the
    library ``tokenizers`` release the interpreter lock. (Two cores, SmolLM2's tokenizer, source code: one call at a
    time 1.7 MB/s, two threads 5.6 MB/s, two spawned processes 3.2 MB/s after 7 s for their start.) Tokenizers that mark
    the start of a text (SentencePiece's leading space) encode each piece after a line end, whose ids are taken off
    again; where even that would change tokens, text is encoded whole. Control tokens that a document spells out, such
    as ``<|endoftext|>``, are encoded as plain text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        cache_dir: Folder for the ids of pieces, keyed by content and tokenizer; None keeps nothing on disk.
        report: Called once with a message when the cache cannot be written.
        vocabulary: What the model knows; other ids are refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        cache_dir: Path | None = None,
        report: Callable[[str], None] | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary or Vocabulary("")
        self._cache = TokenCache(cache_dir, report)
        self._fingerprint = _fingerprint(tokenizer)
        self._backend = _own_backend(tokenizer, controls=False)
        self._control_backend = _own_backend(tokenizer, controls=True)
        self._context = self._needed_context()
        self._places = self._safe_places()
        # A tokenizer written in Python gains nothing from threads, and need not bear them.
        self.threads = 1 if self._backend is None else min(_MOST_THREADS, _cores())

    def encode(self, texts: Iterable[str], max_tokens: int | None = None) -> tuple[Ids, bool]:
        """Ids of the joined ``texts``, and whether text was left when ``max_tokens`` was reached.

        Args:
            texts: A document's text in order; hardly more is taken from it than the limit needs.
            max_tokens: Ids returned at most; None encodes everything.

        Returns:
            Ids, int32 of shape (tokens,), and True when the text was cut.
        """
        pieces = self._pieces(texts, max_tokens)
        # Pieces ahead would be encoded in vain where a few are enough.
        if max_tokens is not None and max_tokens < PIECE_CHARACTERS:
            return _joined(map(self._cached, pieces), pieces, max_tokens)
        parts = self.in_order(self._cached, pieces)
        return _joined(parts, parts, max_tokens)

    def encode_alone(self, texts: Iterable[str], max_tokens: int | None = None) -> tuple[Ids, bool]:
        """As :meth:`encode`, in the calling thread only."""
        pieces = self._pieces(texts, max_tokens)
        return _joined(map(self._cached, pieces), pieces, max_tokens)

    def stream(self, texts: Iterable[str]) -> Iterator[Ids]:
        """Ids of the joined ``texts`` in parts of some 100k tokens, int32 (n,), as :meth:`encode` would give them."""
        return self.in_order(self._cached, self._pieces(texts, None))

    def encode_on_disk(self, texts: Callable[[], Iterable[str]]) -> Ids:
        """Ids of a document that may be larger than memory: an array on disk, read as it is used.

        Args:
            texts: Opens the document's text; it is read once for its hash, and again when it is not encoded yet.

        Returns:
            Ids, int32 of shape (tokens,), memory-mapped; in memory where there is no cache folder to write to.
        """
        content = hashlib.blake2b(b"document", digest_size=20, key=self._fingerprint)
        for text in texts():
            content.update(text.encode("utf-8", "surrogatepass"))
        key = content.hexdigest()
        ids = self._cache.load_document(key)
        if ids is None:
            ids = self._cache.store_document(key, lambda: self.in_order(self._encoded, self._pieces(texts(), None)))
        return self.encode(texts())[0] if ids is None else ids

    def encode_controls(self, text: str, context: str = "") -> list[int]:
        """Ids of a short ``text`` as they come after ``context``; control tokens in it are control tokens."""
        head, whole = self._control_ids(context), self._control_ids(context + text)
        ids = whole[len(head) :] if whole[: len(head)] == head else self._control_ids(text)
        self.vocabulary.check(np.asarray(ids, np.int32))
        return ids

    def cached(self, content: str, make: Callable[[], Ids]) -> Ids:
        """What ``make`` gives, int32 (n,), kept on disk under a hash of ``content`` and the tokenizer."""
        hashed = hashlib.blake2b(b"made", digest_size=20, key=self._fingerprint)
        hashed.update(content.encode("utf-8", "surrogatepass"))
        ids = self._cache.load(hashed.hexdigest())
        if ids is None:
            ids = make()
            self._cache.store(hashed.hexdigest(), ids)
        return ids

    def in_order(self, function: Callable[[In], Out], jobs: Iterable[In]) -> Iterator[Out]:
        """``function`` of each job, in their order, some of them ahead in threads.

        Args:
            function: Must bear several threads; :meth:`encode_alone` does.
            jobs: Taken as they are needed, and at most twice as many ahead as there are threads.
        """
        if self.threads == 1:
            yield from map(function, jobs)
            return
        jobs = iter(jobs)
        first = list(itertools.islice(jobs, 2))
        if len(first) < 2:  # the usual case for a document of a few pages
            yield from map(function, first)
            return
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="encode")
        try:
            waiting: deque[Future[Out]] = deque()
            for job in itertools.chain(first, jobs):
                waiting.append(pool.submit(function, job))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _pieces(self, texts: Iterable[str], max_tokens: int | None) -> Iterator[tuple[str, str]]:
        """(context, piece): the context is put before the piece, and its ids are taken off again."""
        if self._context is None:
            return (("", piece) for piece in self._whole(texts, max_tokens))
        context = self._context
        return ((context if number else "", piece) for number, piece in enumerate(self._cut(texts, max_tokens)))

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
                match = self._places.search(waiting, start + size, start + 2 * size)
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
        ids: list[int]
        text = _well_formed(text)
        if self._backend is not None:
            # A batch of one: this call releases the interpreter lock (`encode` does not) and counts no characters.
            ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = encoded["input_ids"]
        return ids

    def _control_ids(self, text: str) -> list[int]:
        ids: list[int]
        text = _well_formed(text)
        if self._control_backend is not None:
            ids = self._control_backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        else:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _after(self, context: str, text: str) -> list[int]:
        return self._ids(context + text)[len(self._ids(context)) :] if context else self._ids(text)

    def _encoded(self, piece: tuple[str, str]) -> Ids:
        return self.vocabulary.check(np.asarray(self._after(*piece), np.int32))

    def _cached(self, piece: tuple[str, str]) -> Ids:
        context, text = piece
        if len(text) < _CACHED_CHARACTERS:
            return self._encoded(piece)
        content = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=20, key=self._fingerprint, person=context.encode()
        )
        key = content.hexdigest()
        ids = self._cache.load(key)
        if ids is not None:
            return self.vocabulary.check(ids)
        ids = self._encoded(piece)
        self._cache.store(key, ids)
        return ids

    def _needed_context(self) -> str | None:
        """What must stand before a piece so that its ids are those within the whole text; None where nothing helps."""
        if self._agrees("", _PROBES):
            return ""
        if self._agrees("\n", _LINE_PROBES) and not any(
            re.search("\n[^\\s▁]", token.replace("Ċ", "\n")) for token in self.tokenizer.get_vocab()
        ):
            return "\n"
        return None

    def _safe_places(self) -> re.Pattern[str]:
        """Where text may be cut. That no token of the vocabulary reaches over a place makes it safe for BPE and unigram
        models; the probes tell whether something before them, such as splitting by words, looks over it.
        """
        if not self._context:
            return _WORD_OR_LINE
        return _LINE_OR_EMPTY_LINE if self._agrees(self._context, _EMPTY_LINE_PROBES) else _LINE

    def _agrees(self, context: str, probes: Iterable[tuple[str, str]]) -> bool:
        return all(self._ids(a) + self._after(context, b) == self._ids(a + b) for a, b in probes)


def _well_formed(text: str) -> str:
    """``text`` with U+FFFD for half surrogate pairs, which JSON can hold and tokenizers refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _joined(parts: Iterator[Ids], rest: Iterator[object], max_tokens: int | None) -> tuple[Ids, bool]:
    """Parts as one array, at most ``max_tokens`` long, and whether there was more, in it or in ``rest``."""
    kept: list[Ids] = []
    count = 0
    for ids in parts:
        kept.append(ids)
        count += len(ids)
        if max_tokens is not None and count >= max_tokens:
            return np.concatenate(kept)[:max_tokens], count > max_tokens or next(rest, None) is not None
    return (np.concatenate(kept) if kept else np.empty(0, np.int32)), False


def _own_backend(tokenizer: Any, controls: bool) -> Any:
    """A copy of a fast tokenizer that is never changed, so that threads can share it; None where there is none.

    Hugging Face's own call sets truncation, padding and the handling of control tokens on the object each time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = not controls
    expected = tokenizer(_COPY_PROBE, add_special_tokens=False, split_special_tokens=not controls, verbose=False)
    ids = copy.encode_batch_fast([_COPY_PROBE], add_special_tokens=False)[0].ids
    # Some classes change text before their backend sees it.
    return copy if ids == expected["input_ids"] else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fingerprint(tokenizer: Any) -> bytes:
    """Hash of everything that decides a tokenizer's ids, at most 64 bytes (a key for blake2b)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = backend.to_str()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        described = repr((type(tokenizer).__name__, vocabulary))
    return hashlib.blake2b(described.encode("utf-8", "surrogatepass"), digest_size=32).digest()
