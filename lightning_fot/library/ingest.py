"""Reads documents into a memory on disk so that it can be stopped, or killed, at any moment and goes on where it was.

With exact search the memory is then that of a run which nothing stopped, number for number. What an index finds while
documents are read depends on when it was built, so with one the pairs of two runs differ a little, stopped or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.data.text.parts import CHANGED, Skipped, leave_out
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.library.changes import Changes, Replacement, TextDigest, Unread
from lightning_fot.library.forget import forget
from lightning_fot.library.library import Entry, Library
from lightning_fot.system.progress import JobProgress
from lightning_fot.system.signals import StopGuard, Stopped

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

PHASE = "reading"
# A document is saved in between after this time; at its end already after the shorter one.
SAVE_EVERY_S = 60.0
SAVE_AT_END_S = 5.0
# A save writes what the memory knows of every document: it may take this share of the time at most.
SAVE_SHARE = 0.1
_TOKENS_AT_ONCE = 4096
_BYTES_A_TOKEN = 4.0
# Not by time: which documents are read beside which must not depend on how fast the machine is.
_BYTES_REPLACED_AT_ONCE = 2**18


class ChangedError(Exception):
    """A text is not the one that was found."""


class Reader:
    """Reads documents into the memory of a library, with progress and saves.

    A window is read whole or not at all, and each document begins a window. So a document that was cut goes on at its
    next token as if nothing had happened. With ``overlap`` or ``sink_tokens`` windows depend on those before: there, a
    document is saved once it is complete, and one that was cut is read again from its start. So is one that takes the
    place of another, which the folder holds until then.

    Args:
        lm: The library's model.
        tokenizer: Its tokenizer.
        library: Where documents are listed, and the memory is saved.
        progress: Shows what goes on.
        guard: Stops between windows.
        clock: Time source in seconds.
        memory: The library's, where it is loaded already.
    """

    def __init__(
        self,
        lm: MemoryLM,
        tokenizer: Any,
        library: Library,
        progress: JobProgress,
        guard: StopGuard,
        clock: Any = None,
        memory: Memory | None = None,
    ) -> None:
        self.lm = lm
        self.library = library
        self.memory = library.load(lm) if memory is None else memory
        self.skipped = Skipped()
        self.tokens = 0
        """Tokens read so far by this reader."""
        self.documents = 0
        """Documents that it has read to their ends."""
        self.name = ""
        """The document being read."""
        self._encoder = TextEncoder(tokenizer)
        self._progress = progress
        self._guard = guard
        self._clock = time.monotonic if clock is None else clock
        self._saved_at = self._began = self._clock()
        self._save_seconds = 0.0
        self._goes_on = not (lm.config.overlap or lm.config.sink_tokens)
        self._whole = self.memory.snapshot()
        self._place = ""
        self._bytes = self._finished_bytes = self._finished_tokens = self._count = 0
        self._replacing = False
        self._orderly = False

    @property
    def seconds(self) -> float:
        """Time since the model was loaded."""
        return float(self._clock() - self._began)

    def read(self, changes: Changes) -> None:
        """Forgets, renames and replaces documents, and reads new ones to their ends; saves, whatever ends it.

        Args:
            changes: What there is to do.

        Raises:
            Stopped: A signal came; what was read is saved.
            SettingError: The folder cannot be written.
        """
        self._bytes = sum(one.source.size for one in changes.unread)
        self._progress.plan([(PHASE, self._bytes / _BYTES_A_TOKEN)])
        self._progress.start(PHASE)
        replacing = [one for group in changes.replaced for one in group.unread]
        kept = {id(entry) for group in changes.replaced for entry in group.outdated}
        in_place = {one.digest for one in replacing}
        new = [one for one in changes.unread if one.digest not in in_place]
        self._count = len(changes.unread)
        try:
            forget(self.library, self.memory, [entry for entry in changes.outdated if id(entry) not in kept])
            self._rename(changes.renamed)
            self._whole = self.memory.snapshot()
            self._prepare([*replacing, *new])
            for batch in _batches(changes.replaced):
                self._replace(batch)
            for one in new:
                self._begin_one()
                self._read_one(one)
        except Stopped:
            # A second signal may come in the middle of a window: what was saved last counts then.
            if self._orderly:
                self._save_what_is_whole()
            raise
        except Exception:
            # Whatever is wrong with this document, or with the machine, is no reason to lose the others.
            with suppress(Exception):
                if self.tokens:
                    self._save_what_is_whole()
            raise
        self._save()
        self.library.write_whole()
        self._progress.finish(PHASE)

    def close(self) -> None:
        """Lets go what it has taken for the time of reading."""
        return

    def _prepare(self, unread: Sequence[Unread]) -> None:
        """Told of all documents before the first is read."""
        return

    def _save_what_is_whole(self) -> None:
        if not self._goes_on or self._replacing:
            self.memory = self._whole
        self._save()

    def _begin_one(self) -> None:
        self._place = f"document {self.documents + 1}/{self._count}"
        self._check()

    def _rename(self, renamed: Sequence[tuple[Entry, str]]) -> None:
        """Gives documents the names of their places, all at once: they may change them with each other."""
        if not renamed:
            return
        leaving = {entry.name for entry, _ in renamed}
        put: dict[str, Entry] = {}
        for entry, source in renamed:
            name = self.library.free_name(source, leaving, put)
            put[name] = replace(entry, name=name, source=source)
        names = {entry.name: name for (entry, _), name in zip(renamed, put, strict=True)}
        whole = self.memory.snapshot()
        try:
            self.memory.rename(names)
            self.library.commit(self._save_memory, [entry for entry, _ in renamed], list(put.values()))
        except BaseException:
            self.memory = whole
            raise

    def _replace(self, groups: Sequence[Replacement]) -> None:
        """Reads documents that take the places of others; the folder holds these until it holds those."""
        while groups:
            unread = [one for group in groups for one in group.unread]
            outdated = [entry for group in groups for entry in group.outdated]
            leaving = {entry.name for entry in outdated}
            put: dict[str, Entry] = {}
            self._whole, self._replacing = self.memory.snapshot(), True
            changed: Unread | None = None
            for name in leaving:
                if self.memory.log.find(name):
                    self.memory.forget(name)
            for one in unread:
                self._begin_one()
                known = self.library.find(one.digest)
                if known is not None:
                    # It was begun before, as another document.
                    entry = replace(known)
                else:
                    name = self.library.free_name(one.source.name, leaving, put)
                    entry = Entry(name, one.source.name, one.digest, places=list(one.places))
                if not self._read_whole(one, entry):
                    changed = one
                    break
                put[entry.name] = entry
            if changed is None:
                # Nothing is saved in between: the folder goes from the one state to the other.
                begun = [known for name in put if (known := self.library.named(name)) and name not in leaving]
                self.library.commit(self._save_memory, [*outdated, *begun], list(put.values()))
                self._whole, self._replacing = self.memory.snapshot(), False
                return
            # What stands there is not what was found a moment ago: what was read there before stays until it is found.
            self.memory, self._replacing = self._whole, False
            groups = [group for group in groups if changed not in group.unread]

    def _read_one(self, unread: Unread) -> None:
        source = unread.source
        entry = self.library.find(unread.digest)
        if entry is None:
            entry = self.library.add(source.name, unread.digest, unread.places)
        # Listed before any of it can be saved: a kill must not leave tokens in the memory that no document owns.
        self.library.write()
        if not self._read_whole(unread, entry):
            forget(self.library, self.memory, [entry])
            self._whole = self.memory.snapshot()
            return
        self.library.changed(entry)
        if not self._goes_on:
            self._whole = self.memory.snapshot()
        if self._is_time(SAVE_AT_END_S):
            self._save()

    def _read_whole(self, unread: Unread, entry: Entry) -> bool:
        """Reads a document to its end; gives whether it is the one that was found."""
        self.name = entry.name
        total = start = self._tokens_of(entry)
        left_out = self.skipped.total()
        try:
            for count in self._taken_in(unread, entry, start):
                total += count
        except ChangedError:
            if self.skipped.total() == left_out:
                leave_out(self.skipped, CHANGED, unread.source.name)
            return False
        entry.tokens, entry.read_at = total, int(self.memory.tokens_seen.sum())
        self.documents += 1
        self._finished_bytes += unread.source.size
        self._finished_tokens += total
        return True

    def _taken_in(self, unread: Unread, entry: Entry, start: int) -> Iterator[int]:
        """Reads a document from token ``start`` on into the memory; gives the tokens of each part."""
        for ids in self._parts(unread, start):
            self.lm.ingest(ids, self.memory, progress=self._window_read, document=entry.name)
            yield ids.shape[1]

    def _is_time(self, seconds: float) -> bool:
        """Whether it is so long since the last save, and long enough to bear what a save costs."""
        return bool(self._clock() - self._saved_at >= max(seconds, self._save_seconds / SAVE_SHARE))

    def _tokens_of(self, entry: Entry) -> int:
        return sum(document.tokens for document in self.memory.log.find(entry.name))

    def _parts(self, unread: Unread, start: int) -> Iterator[Tensor]:
        """Ids (1, n) from token ``start`` on; whole windows, but for the last part.

        Raises:
            ChangedError: The text is not the one that was found.
        """
        text = TextDigest(unread.source.pieces(self.skipped))
        window = self.lm.config.window
        size = max(1, _TOKENS_AT_ONCE // window) * window if self._goes_on else None
        waiting: list[Tensor] = []
        count = passed = 0
        for piece in self._encoder.stream(text):
            left = piece[max(0, start - passed) :]
            passed += len(piece)
            waiting.append(torch.as_tensor(left, dtype=torch.int64))
            count += len(left)
            while size is not None and count >= size:
                ids = torch.cat(waiting)
                yield ids[None, :size]
                waiting, count = [ids[size:]], count - size
        if text.hexdigest() != unread.digest:
            raise ChangedError
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
        if self._goes_on and not self._replacing and self._is_time(SAVE_EVERY_S):
            self._save()
        self._check()

    def _check(self) -> None:
        """Stops here if a signal has come."""
        self._orderly = True
        self._guard.check()
        self._orderly = False

    def _save(self) -> None:
        # The list first: what it says of documents that the memory does not hold yet is not believed (see library).
        began = self._clock()
        self.library.write(durable=True)
        self._save_memory(began)

    def _save_memory(self, began: float | None = None) -> None:
        began = self._clock() if began is None else began
        self.memory.save(self.library.path)
        self._saved_at = self._clock()
        self._save_seconds = self._saved_at - began


def _batches(groups: Sequence[Replacement]) -> Iterator[list[Replacement]]:
    """Groups that are read before the next save: forgetting packs the whole memory, whatever it forgets."""
    batch: list[Replacement] = []
    size = 0
    for group in groups:
        more = sum(one.source.size for one in group.unread)
        if batch and size + more > _BYTES_REPLACED_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += more
    if batch:
        yield batch
