"""Documents of several sources, mixed so that the tokens read from each keep to its weight."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from lightning_fot.config.sources import FactsSettings, PasskeySettings, RecallSettings
from lightning_fot.data.rows.plan import Stream, Supply
from lightning_fot.data.rows.sequences import MadeSequence, Mask, TokenSequence
from lightning_fot.data.text.documents import Document
from lightning_fot.data.text.token_cache import Ids
from lightning_fot.errors import SettingError

# What a source without end holds out.
HELDOUT_DOCUMENTS = 8


class MixtureSource(ABC):
    """One source of a mixture.

    Attributes:
        setting: Where it was set, such as ``data.sources[0]``.
        weight: Share of the tokens.
        passes: How often its documents are read at most; None reads them as often as they are needed.
        made: Whether its documents are made for a task, and no texts.
    """

    made = False

    def __init__(self, setting: str, weight: float, passes: int | None = None) -> None:
        self.setting = setting
        self.weight = weight
        self.passes = passes

    @abstractmethod
    def documents(self, number: int) -> Iterator[TokenSequence]:
        """Documents of pass ``number`` in its order; the same each time it is called."""

    @abstractmethod
    def heldout(self) -> Iterator[TokenSequence]:
        """Documents that training never sees, as it would read them."""

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """The same as text, without targets; none where a source has none to give."""
        return iter(())

    @property
    def heldout_keys(self) -> frozenset[Hashable]:
        """Keys of the held-out documents."""
        return frozenset()

    def leave_out(self, keys: frozenset[Hashable]) -> None:  # noqa: B027  (most sources have nothing to leave out)
        """Take documents with these keys, held out by another source, out of training."""

    def check_training(self) -> None:  # noqa: B027  (most sources cannot be without)
        """Raise SettingError where no document is left for training."""

    @property
    def count(self) -> int | None:
        """Documents of a pass at most; None when it is not known or there is no end."""
        return None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a pass at most; None when it is not known or there is no end."""
        return None

    @property
    @abstractmethod
    def mark(self) -> object:
        """What decides its documents; equal marks mean equal documents."""


SettingsT = TypeVar("SettingsT", bound=PasskeySettings | FactsSettings | RecallSettings)


class MadeSource(MixtureSource, Generic[SettingsT]):
    """Documents made for a task, without end; document i is a function of the seeds and i.

    Args:
        settings: What they are like.
        tokenizer: A Hugging Face tokenizer.
        seed: The data module's.
    """

    made = True

    def __init__(self, settings: SettingsT, tokenizer: Any, seed: int) -> None:
        super().__init__(settings.setting, settings.weight)
        self._settings = settings
        self._tokenizer = tokenizer
        self._seed = seed

    def documents(self, number: int) -> Iterator[TokenSequence]:
        """All of them: there is one pass."""
        return (self._document(index, heldout=False) for index in itertools.count())

    def heldout(self) -> Iterator[TokenSequence]:
        """Some that are drawn apart."""
        return (self._document(index, heldout=True) for index in range(HELDOUT_DOCUMENTS))

    @property
    def mark(self) -> object:
        """Its settings."""
        return repr(self._settings), self._seed

    def _draw(self, *numbers: int) -> int:
        """A number that tells apart all that a run can draw."""
        state = np.random.SeedSequence([self._seed, self._settings.seed, *numbers]).generate_state(1, np.uint64)
        return int(state[0])

    def _document(self, index: int, heldout: bool) -> TokenSequence:
        return MadeSequence(self._settings.tokens, lambda: self._make(index, heldout))

    @abstractmethod
    def _make(self, index: int, heldout: bool) -> tuple[Ids, Mask]:
        """Ids int32 (tokens,) of document ``index``, and which of them the loss counts, bool (tokens,)."""


class Mixture(Supply):
    """Gives the next document of that source which is most behind its weight.

    A stream that needs a document gets one of the source whose tokens, counted to the end of the coming batch, are the
    fewest for its weight. So shares are kept from the first batches on: with weights 3 and 1, six of eight streams read
    the first source. A document is not begun while another stream reads it, or has read it in the windows that the
    batch holds; it waits, and what comes after it is read first. A source all of whose documents wait gives way to the
    next one.

    Args:
        sources: What to mix.
        step: Tokens that a stream reads in a batch.

    Raises:
        SettingError: When a source has no document in a whole pass.
    """

    def __init__(self, sources: Sequence[MixtureSource], step: int) -> None:
        self._states = [_SourceState(source) for source in sources]
        self._step = step

    @property
    def exhausted(self) -> bool:
        """Whether every source has had its last pass; never, when one is read as often as needed."""
        return all(state.exhausted for state in self._states)

    def take(self, streams: Sequence[Stream], number: int) -> TokenSequence | None:
        """The next document for stream ``number``; None when all that could come is being read by others."""
        blocked = set(streams[number].reads_now)
        for other, stream in enumerate(streams):
            if other != number:
                blocked |= stream.reads_lately
        for place in sorted(range(len(self._states)), key=lambda place: self._progress(place, streams)):
            state = self._states[place]
            document = state.next(blocked)
            if document is not None:
                document.source = place
                state.given += len(document)
                return document
        return None

    def _progress(self, place: int, streams: Sequence[Stream]) -> float:
        """Tokens of a source read by the end of the coming batch, for its weight, if it gives the next document."""
        state = self._states[place]
        read = state.given + self._step
        for stream in streams:
            if stream.left and stream.document is not None and stream.document.source == place:
                read += min(stream.left, self._step) - stream.left
        return read / state.source.weight


class _SourceState:
    """How far a source has been given."""

    def __init__(self, source: MixtureSource) -> None:
        self.source = source
        self.given = 0
        self._passes = 0
        self._documents: Iterator[TokenSequence] | None = None
        self._found = False
        self._waiting: deque[TokenSequence] = deque()

    @property
    def exhausted(self) -> bool:
        return self._documents is None and not self._waiting and self._passes == self.source.passes

    def next(self, blocked: set[Hashable]) -> TokenSequence | None:
        document = self._free(blocked)
        if self.source.passes is not None and not self._waiting:
            # The end is known with the last document, not when one more is asked for.
            following = self._read()
            if following is not None:
                self._waiting.append(following)
        return document

    def _free(self, blocked: set[Hashable]) -> TokenSequence | None:
        for place, document in enumerate(self._waiting):
            if document.keys.isdisjoint(blocked):
                del self._waiting[place]
                return document
        while True:
            following = self._read()
            if following is None:
                return None
            if following.keys.isdisjoint(blocked):
                return following
            self._waiting.append(following)

    def _read(self) -> TokenSequence | None:
        """The next document of this pass, or the first of the next one once none of this pass waits."""
        while True:
            if self._documents is None:
                if self._waiting or self._passes == self.source.passes:
                    return None
                self._documents = self.source.documents(self._passes)
                self._passes += 1
                self._found = False
            # Of one token there is nothing to predict.
            document = next((one for one in self._documents if len(one) > 1), None)
            if document is not None:
                self._found = True
                return document
            if not self._found:
                raise SettingError(
                    self.source.setting,
                    self.source.weight,
                    "has no document that is long enough",
                    f"Add documents to it, lower its min_tokens, or take {self.source.setting} out.",
                )
            self._documents = None
