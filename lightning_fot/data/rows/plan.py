"""Which tokens each row of each training batch holds: a pure function of documents, geometry and batch number.

A *stream* reads one document to its end, then the next that no other stream has taken, joined in mid-row by
``<eos><bos>`` (as far as the tokenizer has them). Layout ``packed``: the rows p·j … p·j+p-1 of a batch are consecutive
windows of stream j (LongLLaMA's recipe). Layout ``paper``: row i is one window of stream i, and the windows before it
come along as ``previous_ids`` (FoT, arXiv 2307.03170, section 3.2).

Tensor names: B rows, T tokens of a window, w previous windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fot.config.data import IGNORED
from lightning_fot.data.rows.sequences import TextSequence, TokenSequence
from lightning_fot.data.text.token_cache import Ids

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """Geometry of a batch over all ranks.

    Args:
        rows: B, rows of all ranks together; a multiple of ``pack``.
        window: T, tokens of a row.
        pack: Rows that are consecutive windows of one stream (1 in layout ``paper``).
        previous: w, windows before the row that come along (0 in layout ``packed``).
        pad_id: Fills rows after the end of their stream.
    """

    rows: int
    window: int
    pack: int = 1
    previous: int = 0
    pad_id: int = 0

    @property
    def streams(self) -> int:
        """Documents that are read side by side."""
        return self.rows // self.pack

    @property
    def step(self) -> int:
        """Tokens that a stream gives to a batch."""
        return self.window * self.pack


class Stream:
    """One reader: the document it is in, and how far it has come.

    Args:
        previous: Batches before the one in the making that still count as read side by side with others.
    """

    def __init__(self, previous: int = 0) -> None:
        self.document: TokenSequence | None = None
        self.at = 0
        self._recent: deque[set[Hashable]] = deque([set() for _ in range(previous + 1)], maxlen=previous + 1)

    @property
    def left(self) -> int:
        """Tokens of the document that were not read yet."""
        return 0 if self.document is None else len(self.document) - self.at

    @property
    def reads_now(self) -> set[Hashable]:
        """Keys of what it reads in this batch."""
        return self._recent[-1]

    @property
    def reads_lately(self) -> set[Hashable]:
        """Keys of what it reads in this batch, or has read in the ``previous`` ones before it."""
        return set().union(*self._recent)

    def enter_batch(self, count: int = 1) -> None:
        """A batch begins, or ``count`` of them in which it stays in its document."""
        for _ in range(min(count, len(self._recent))):
            self._recent.append(set(self.document.keys) if self.left and self.document is not None else set())

    def take(self, document: TokenSequence) -> None:
        """Begin a document."""
        self.document, self.at = document, 0
        self.reads_now.update(document.keys)


class Supply(ABC):
    """Gives streams their next documents."""

    @abstractmethod
    def take(self, streams: Sequence[Stream], number: int) -> TokenSequence | None:
        """The next document for stream ``number``, of at least two tokens; None when there is none at the moment.

        What it gives may depend on what was given before and on what the streams have read, and on nothing else.
        """

    @property
    @abstractmethod
    def exhausted(self) -> bool:
        """Whether nothing is left to be given, now or later."""


class Pass(Supply):
    """Documents in a given order, each once.

    Args:
        documents: Each of at least two tokens.
    """

    def __init__(self, documents: Iterator[TokenSequence | Ids]) -> None:
        self._documents = documents
        self._waiting = next(documents, None)

    def take(self, streams: Sequence[Stream], number: int) -> TokenSequence | None:
        """The next document in order."""
        document, self._waiting = self._waiting, next(self._documents, None)
        return document if document is None or isinstance(document, TokenSequence) else TextSequence(document)

    @property
    def exhausted(self) -> bool:
        """Whether all were given."""
        return self._waiting is None


class Epoch:
    """One pass over the documents; each token is read once, by one stream, in order.

    The pass is over when no token is left to predict. Streams that end before others give padding without targets.

    Args:
        documents: What streams take: a supply, or documents in their order (ids int32 (tokens,) with their special
            tokens). The first token of a document is no target.
        plan: Geometry.
    """

    def __init__(self, documents: Supply | Iterator[TokenSequence | Ids], plan: RowPlan) -> None:
        self._plan = plan
        self._supply = documents if isinstance(documents, Supply) else Pass(documents)
        self._streams = [Stream(plan.previous) for _ in range(plan.streams)]
        empty = np.full((plan.rows, plan.window), plan.pad_id, np.int64)
        self._history: deque[tuple[Array, npt.NDArray[np.bool_]]] = deque(
            [(empty, np.zeros(plan.rows, np.bool_))] * plan.previous, maxlen=plan.previous
        )

    @property
    def done(self) -> bool:
        """Whether the pass is over."""
        return self._supply.exhausted and all(stream.left <= 1 for stream in self._streams)

    def skip(self, batches: int) -> int:
        """Go ``batches`` on without making them, or to the end of the pass; returns how many there were."""
        skipped = 0
        while skipped < batches and not self.done:
            if batches - skipped <= self._plan.previous:
                self.next()
                skipped += 1
                continue
            # As long as no stream comes to its document's last token, steps differ in nothing but the position.
            easy = min((stream.left - 1) // self._plan.step for stream in self._streams)
            easy = min(easy, batches - skipped - self._plan.previous)
            if easy > 0:
                for stream in self._streams:
                    stream.at += easy * self._plan.step
                    stream.enter_batch(easy)
                skipped += easy
            else:
                for _ in self._advance():
                    pass
                skipped += 1
        return skipped

    def next_names(self) -> list[list[str]]:
        """Goes one batch on without making it; for each stream the names of the documents that it would have read."""
        names: list[list[str]] = [[] for _ in self._streams]
        for number, _, document, _, _ in self._advance():
            names[number].append(document.name)
        return names

    def next(self) -> dict[str, Any]:
        """The next batch.

        Returns:
            ``input_ids`` and ``targets`` int64 (B, T); with w > 0 also ``previous_ids`` int64 (B, w, T) and
            ``previous_valid`` bool (B, w), oldest window first.
        """
        plan = self._plan
        inputs = np.full((plan.streams, plan.step), plan.pad_id, np.int64)
        targets = np.full((plan.streams, plan.step), IGNORED, np.int64)
        filled = np.zeros((plan.streams, plan.step), np.bool_)
        for number, position, document, start, count in self._advance():
            # One more: the target of the last. After a document's end comes another's start: nothing predicts that.
            ids, scored = document.read(start, min(start + count + 1, len(document)))
            inputs[number, position : position + count] = ids[:count]
            filled[number, position : position + count] = True
            following = ids[1:] if scored is None else np.where(scored[1:], ids[1:], IGNORED)
            targets[number, position : position + len(following)] = following
        batch: dict[str, Any] = {
            "input_ids": inputs.reshape(plan.rows, plan.window),
            "targets": targets.reshape(plan.rows, plan.window),
        }
        if plan.previous:
            batch["previous_ids"] = np.stack([ids for ids, _ in self._history], axis=1)
            batch["previous_valid"] = np.stack([real for _, real in self._history], axis=1)
            valid: npt.NDArray[np.bool_] = np.any(filled.reshape(plan.rows, plan.window), axis=1)
            self._history.append((batch["input_ids"], valid))
        return batch

    def _advance(self) -> Iterator[tuple[int, int, TokenSequence, int, int]]:
        """One batch: (stream, place in its rows, document, start, count) of each stretch that is read."""
        for stream in self._streams:
            stream.enter_batch()
        for number, stream in enumerate(self._streams):
            position = 0
            while position < self._plan.step:
                if stream.left == 0:
                    document = self._supply.take(self._streams, number)
                    if document is None:
                        break
                    stream.take(document)
                assert stream.document is not None  # for the type checker: something is left of it
                count = min(self._plan.step - position, stream.left)
                start = stream.at
                stream.at += count
                yield number, position, stream.document, start, count
                position += count


class BatchSequence:
    """Batch after batch, epoch after epoch; batch t is always the same.

    Args:
        open_epoch: Gives the documents of an epoch, as ``Epoch`` takes them.
        plan: Geometry over all ranks.
        rank: Whose rows ``next`` gives.
        world_size: Ranks; each gets ``plan.rows / world_size`` neighbouring rows, whole packs.
    """

    def __init__(
        self,
        open_epoch: Callable[[int], Supply | Iterator[TokenSequence | Ids]],
        plan: RowPlan,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._open = open_epoch
        self._plan = plan
        rows = plan.rows // world_size
        self._mine = slice(rank * rows, (rank + 1) * rows)
        self._rewind()

    def _rewind(self) -> None:
        self.position = 0
        self.epoch_number = 0
        self._epoch = Epoch(self._open(0), self._plan)

    @property
    def epoch_ended(self) -> bool:
        """Whether the batch before was the last of its epoch; the next one starts another."""
        return self._epoch.done

    def seek(self, batch: int) -> None:
        """Make ``next`` give batch number ``batch`` (or raise StopIteration, where there are no documents at all)."""
        if batch < self.position:
            self._rewind()
        while self.position < batch:
            self._enter_epoch()
            if self._epoch.done:
                return
            self.position += self._epoch.skip(batch - self.position)

    def next(self) -> dict[str, Any]:
        """The next batch: this rank's rows of ``Epoch.next``.

        Raises:
            StopIteration: No document is left in a whole epoch.
        """
        self._enter_epoch()
        if self._epoch.done:
            raise StopIteration
        batch = self._epoch.next()
        self.position += 1
        return {name: values[self._mine] for name, values in batch.items()}

    def names(self, batch: int) -> list[str]:
        """Names of the documents in this rank's rows of a batch, each once; those that have none are left out."""
        self.seek(batch)
        self._enter_epoch()
        if self._epoch.done:
            return []
        self.position += 1
        streams = slice(self._mine.start // self._plan.pack, self._mine.stop // self._plan.pack)
        found = (name for names in self._epoch.next_names()[streams] for name in names if name)
        return list(dict.fromkeys(found))

    def _enter_epoch(self) -> None:
        if self._epoch.done and self.position:
            self.epoch_number += 1
            self._epoch = Epoch(self._open(self.epoch_number), self._plan)
