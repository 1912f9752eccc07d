"""Reads documents into a memory on disk so that it can be stopped, or killed, at any moment and goes on exactly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.data.text.parts import DocumentSource
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.library.library import Entry, Library
from lightning_fot.system.progress import JobProgress
from lightning_fot.system.signals import StopGuard, Stopped

if TYPE_CHECKING:
    from lightning_fot.model.lm import MemoryLM

PHASE = "reading"
# A document is saved in between after this time; at its end already after the shorter one.
SAVE_EVERY_S = 60.0
SAVE_AT_END_S = 5.0
_TOKENS_AT_ONCE = 4096
_BYTES_A_TOKEN = 4.0


class Reader:
    """Reads documents into the memory of a library, with progress and saves.

    A window is read whole or not at all, and each document begins a window. So a document that was cut goes on at its
    next token as if nothing had happened. With ``overlap`` or ``sink_tokens`` windows depend on those before: there, a
    document is saved once it is complete, and one that was cut is read again from its start.

    Args:
        lm: The library's model.
        tokenizer: Its tokenizer.
        library: Where documents are listed, and the memory is saved.
        progress: Shows what goes on.
        guard: Stops between windows.
        clock: Time source in seconds.
    """

    def __init__(
        self, lm: MemoryLM, tokenizer: Any, library: Library, progress: JobProgress, guard: StopGuard, clock: Any = None
    ) -> None:
        self.lm = lm
        self.library = library
        self.memory = library.load(lm)
        self.skipped: Counter[str] = Counter()
        self.tokens = 0
        """Tokens read so far by this reader."""
        self.name = ""
        """The document being read."""
        self._encoder = TextEncoder(tokenizer)
        self._progress = progress
        self._guard = guard
        self._clock = time.monotonic if clock is None else clock
        self._saved_at = self._began = self._clock()
        self._goes_on = not (lm.config.overlap or lm.config.sink_tokens)
        self._whole = self.memory.snapshot()
        self._place = ""
        self._bytes = self._finished_bytes = self._finished_tokens = 0
        self._orderly = False

    def read(self, sources: Sequence[tuple[DocumentSource, str]]) -> None:
        """Reads documents to their ends, one after the other; saves, whatever ends it.

        Args:
            sources: Documents and the digests of their texts.

        Raises:
            Stopped: A signal came; what was read is saved.
            SettingError: The folder cannot be written.
        """
        self._bytes = sum(source.size for source, _ in sources)
        self._progress.plan([(PHASE, self._bytes / _BYTES_A_TOKEN)])
        self._progress.start(PHASE)
        try:
            for number, (source, digest) in enumerate(sources, start=1):
                self._place = f"document {number}/{len(sources)}"
                self._check()
                self._read_one(source, digest)
        except Stopped:
            # A second signal may come in the middle of a window: what was saved last counts then.
            if self._orderly:
                if not self._goes_on:
                    self.memory = self._whole
                self._save()
            raise
        self._save()
        self._progress.finish(PHASE)

    def _read_one(self, source: DocumentSource, digest: str) -> None:
        entry = self.library.find(digest)
        if entry is None:
            self._drop_old(source)
            entry = self.library.add(source.name, digest)
        self.name = entry.name
        # Listed before any of it can be saved: a kill must not leave tokens in the memory that no document owns.
        self.library.write()
        total = start = self._tokens_of(entry)
        for ids in self._parts(source, start):
            self.lm.ingest(ids, self.memory, progress=self._window_read, document=entry.name)
            total += ids.shape[1]
        entry.tokens, entry.read_at = total, int(self.memory.tokens_seen.sum())
        self._finished_bytes += source.size
        self._finished_tokens += total
        if not self._goes_on:
            self._whole = self.memory.snapshot()
        if self._clock() - self._saved_at >= SAVE_AT_END_S:
            self._save()

    def _drop_old(self, source: DocumentSource) -> None:
        """Forgets what was read of a document that was cut and has changed since: its rest will never come."""
        for old in [one for one in self.library.documents if one.source == source.name and not one.done]:
            if self._tokens_of(old):
                self.memory.forget(old.name)
                # At once: after a kill, its tokens would pass for those of the new document, which gets its name.
                self.memory.save(self.library.path)
                self._whole = self.memory.snapshot()
            self.library.documents.remove(old)

    def _tokens_of(self, entry: Entry) -> int:
        return sum(document.tokens for document in self.memory.log.find(entry.name))

    def _parts(self, source: DocumentSource, start: int) -> Iterator[Tensor]:
        """Ids (1, n) from token ``start`` on; whole windows, but for the last part."""
        window = self.lm.config.window
        size = max(1, _TOKENS_AT_ONCE // window) * window if self._goes_on else None
        waiting: list[Tensor] = []
        count = passed = 0
        for piece in self._encoder.stream(source.pieces(self.skipped)):
            left = piece[max(0, start - passed) :]
            passed += len(piece)
            waiting.append(torch.as_tensor(left, dtype=torch.int64))
            count += len(left)
            while size is not None and count >= size:
                ids = torch.cat(waiting)
                yield ids[None, :size]
                waiting, count = [ids[size:]], count - size
        if count:
            yield torch.cat(waiting)[None]

    def _window_read(self, tokens: int) -> None:
        self.tokens += tokens
        speed = self.tokens / max(1e-9, self._clock() - self._began)
        note = f"{self._place} {self.name}, {self.tokens:,} tokens, {speed:,.0f} tokens/s"
        if self._finished_bytes:
            # Texts differ in bytes a token: from the second document on, those read tell.
            self._progress.plan([(PHASE, self._bytes * self._finished_tokens / self._finished_bytes)])
        self._progress.advance(tokens, note)
        if self._goes_on and self._clock() - self._saved_at >= SAVE_EVERY_S:
            self._save()
        self._check()

    def _check(self) -> None:
        """Stops here if a signal has come."""
        self._orderly = True
        self._guard.check()
        self._orderly = False

    def _save(self) -> None:
        # The list first: what it says of documents that the memory does not hold yet is not believed (see library).
        self.library.write()
        self.memory.save(self.library.path)
        self._saved_at = self._clock()
