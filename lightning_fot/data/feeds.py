"""What the data module reads: the documents of ``paths``, or a mixture of sources."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_fot.config.sources import SourceSettings
from lightning_fot.data.mixture.assemble import check_enough, exhausted, open_sources
from lightning_fot.data.mixture.base import Mixture
from lightning_fot.data.mixture.texts import TextSource, text_sequence
from lightning_fot.data.rows.plan import Epoch, Pass, RowPlan, Supply
from lightning_fot.data.rows.sequences import Specials, TokenSequence
from lightning_fot.data.text.documents import Corpus, Document, Item
from lightning_fot.data.text.readers import too_short
from lightning_fot.data.text.selection import Selection, SelectionSettings
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError

Say = Callable[[str], None]
_SAID_EVERY_S = 5.0


class Feed(ABC):
    """Documents for training and for validation."""

    @abstractmethod
    def training(self, plan: RowPlan, epoch: int) -> Supply:
        """Documents of an epoch; the same each time it is called."""

    @abstractmethod
    def heldout(self, plan: RowPlan) -> Supply:
        """One pass over the held-out documents."""

    @abstractmethod
    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """Held-out documents of at least so many tokens, each encoded when it is asked for."""

    @abstractmethod
    def prepare(self, plan: RowPlan, ahead: int, total: int | None) -> None:
        """Encode what training will read first, and check that there is enough.

        Args:
            plan: Geometry of the batches.
            ahead: Tokens to encode.
            total: Tokens that training will read; None when that is not known.

        Raises:
            SettingError: There is not.
        """

    @property
    @abstractmethod
    def endless(self) -> bool:
        """Whether an epoch has no end."""

    @property
    @abstractmethod
    def mark(self) -> object:
        """What decides the documents: equal marks mean equal batches."""


class PathsFeed(Feed):
    """The documents of ``data.paths``: each once in an epoch.

    Args:
        settings: Which documents.
        min_tokens: Documents with fewer are left out.
        max_document_tokens: Documents are cut after so many.
        encoder: Text to ids.
        say: Called with what users should know.

    Raises:
        SettingError: No text, or none that is long enough.
    """

    def __init__(
        self,
        settings: SelectionSettings,
        min_tokens: int,
        max_document_tokens: int | None,
        encoder: TextEncoder,
        say: Say,
    ) -> None:
        self._paths = settings.paths
        self._say = say
        self._specials = Specials.of(encoder.tokenizer)
        self._corpus = Corpus(encoder, min_tokens, max_document_tokens)
        self._selection = Selection(settings, self._corpus, say)

    def training(self, plan: RowPlan, epoch: int) -> Supply:
        """Training documents in the order of the epoch."""
        return Pass(self._sequences(self._selection.order(plan.streams, epoch)))

    def heldout(self, plan: RowPlan) -> Supply:
        """Held-out documents."""
        return Pass(self._sequences(self._selection.fill(self._selection.heldout, plan.streams)))

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """Held-out documents, in a seeded order."""
        return self._selection.heldout_documents(min_tokens)

    def prepare(self, plan: RowPlan, ahead: int, total: int | None) -> None:
        """Encode documents; there must be text for a batch."""
        self._selection.check_training()
        batch = plan.rows * plan.window
        count, said = 0, time.monotonic()
        for document in self._sequences(self._selection.order(plan.streams, 0)):
            count += len(document)
            if count >= ahead:
                break
            said = _tell(self._say, said, count, ahead)
        minimum = self._corpus.min_tokens
        if count == 0:
            raise too_short("data.paths", self._paths, len(self._selection.train), minimum, "all are shorter")
        if count < batch:
            raise SettingError(
                "data.batch_size",
                plan.rows,
                f"a batch takes {batch:,} tokens, but the training documents have {count:,}",
                "Add documents, or lower data.batch_size or model.memory.window.",
            )
        say_left_out(self._corpus, self._say)

    @property
    def endless(self) -> bool:
        """An epoch ends."""
        return False

    @property
    def mark(self) -> object:
        """The training documents."""
        return self._selection.mark

    def _sequences(self, items: list[Item]) -> Iterator[TokenSequence]:
        for item, ids in self._corpus.in_order(items):
            if ids is not None and len(ids):
                yield text_sequence(item, ids, self._specials)
        say_left_out(self._corpus, self._say)


class MixtureFeed(Feed):
    """A mixture of sources. It has no end, unless every source has a last pass; then it is one epoch.

    Args:
        settings: Of the sources.
        defaults: Values for what they leave open, by name.
        encoder: Text to ids.
        seed: The data module's.
        say: Called with what users should know.

    Raises:
        SettingError: A source is empty or cannot be opened.
    """

    def __init__(
        self, settings: Sequence[SourceSettings], defaults: dict[str, Any], encoder: TextEncoder, seed: int, say: Say
    ) -> None:
        self._say = say
        self._sources = open_sources(settings, defaults, encoder, seed, say)
        self._settings = settings

    def training(self, plan: RowPlan, epoch: int) -> Supply:
        """The mixture.

        Raises:
            SettingError: A second epoch is asked for: all sources are exhausted.
        """
        if epoch:
            raise exhausted(self._sources, "their last passes are over before the training is")
        return Mixture(self._sources, plan.step)

    def heldout(self, plan: RowPlan) -> Supply:
        """Held-out documents of one source after the other."""
        return Pass(document for source in self._sources for document in source.heldout())

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """Held-out documents of each source in turn: texts, or what is made for a task where there is no text."""
        texts = [source for source in self._sources if not source.made]
        turns = [source.heldout_documents(min_tokens) for source in texts or self._sources]
        while turns:
            for documents in list(turns):
                document = next(documents, None)
                if document is None:
                    turns.remove(documents)
                else:
                    yield document

    def prepare(self, plan: RowPlan, ahead: int, total: int | None) -> None:
        """Encode what the first batches read; documents for all streams, and no end before the training's."""
        check_enough(self._sources, plan.streams, total)
        batch = plan.rows * plan.window
        epoch, said = Epoch(Mixture(self._sources, plan.step), plan), time.monotonic()
        if all(source.made and source.passes is None for source in self._sources):
            # They never end, and what is made is not kept: made now, it would be made twice.
            ahead = batch
        for number in range(-(-ahead // batch)):
            if not epoch.skip(1):
                if number == 0 or total is not None:
                    raise exhausted(self._sources, f"they last for {number:,} batches")
                break
            said = _tell(self._say, said, number * batch, ahead)
        for source in self._sources:
            if isinstance(source, TextSource):
                say_left_out(source.corpus, self._say, source.setting)

    @property
    def endless(self) -> bool:
        """Whether one of the sources is read as often as needed."""
        return any(source.passes is None for source in self._sources)

    @property
    def mark(self) -> object:
        """The sources' settings and documents."""
        return [(type(source).__name__, source.weight, source.passes, source.mark) for source in self._sources]


def say_left_out(corpus: Corpus, say: Say, setting: str = "data") -> None:
    """Say what was left out so far; documents are encoded as they are read, so more may follow."""
    where = "" if setting == "data" else f" in {setting}"
    if corpus.short:
        say(f"Left out{where} as shorter than {corpus.min_tokens:,} tokens: {_listed(sorted(corpus.short))}.")
    if corpus.cut:
        say(f"Cut{where} at max_document_tokens={corpus.max_document_tokens:,}: {_listed(sorted(corpus.cut))}.")
    for reason, number in corpus.skipped.items():
        say(f"Left out{where} while reading: {number:,} files {reason}.")


def _tell(say: Say, said: float, count: int, wanted: int) -> float:
    """Says how far encoding is, every few seconds; returns when it was said last."""
    now = time.monotonic()
    if now - said <= _SAID_EVERY_S:
        return said
    say(f"Encoding text: {count:,} of up to {wanted:,} tokens.")
    return now


def _listed(names: list[str], shown: int = 5) -> str:
    rest = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"{len(names):,} ({', '.join(names[:shown])}{rest})"
