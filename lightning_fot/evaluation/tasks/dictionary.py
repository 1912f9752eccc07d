"""Dictionary lookup at any size (FoT paper, section 4.1): a memory of records that grows, the same questions each time.

The layout is that of the training documents of :mod:`lightning_fot.data.mixture.dictionary`: a window begins with the
start token, whole records follow, padding fills it; the questions follow each other in windows of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fot.config.tasks import RECORD_TOKENS, DictionaryTask
from lightning_fot.data.mixture.dictionary import DictionaryTokens
from lightning_fot.evaluation.tasks.parts.episode import Episode, Ids, Probe

# Sets the draws of an evaluation apart from those of any training source, which have four numbers.
_KEYS, _VALUES, _QUESTIONS = 1, 2, 3


class DictionaryLookup:
    """Records 0, 1, 2 … in windows 0, 1, 2 …: a memory of more tokens begins with all that a smaller one holds.

    Args:
        settings: What is asked.
        tokenizer: Gives the ids.
        window: Tokens of a window.
        local: Tokens that questions may fill.

    Raises:
        SettingError: The tokenizer has too few tokens.
    """

    def __init__(self, settings: DictionaryTask, tokenizer: Any, window: int, local: int) -> None:
        self._settings = settings
        self._window = window
        self._tokens = DictionaryTokens.of(tokenizer, settings.vocabulary, "evaluation.dictionary.vocabulary")
        self._table: Ids = np.empty((0, RECORD_TOKENS), np.int32)
        smallest = settings.records(settings.lengths[0], window)
        draw = np.random.default_rng([settings.seed, _QUESTIONS])
        asked = self._records(smallest)[draw.permutation(smallest)[: settings.questions]]
        self._probes = _probes(asked, self._tokens.question, max(1, local // RECORD_TOKENS))

    def episodes(self, length: int) -> list[Episode]:
        """One: ``length`` tokens of records in whole windows, and the questions."""
        start = [] if self._tokens.specials.bos is None else [self._tokens.specials.bos]
        room = (self._window - 1) // RECORD_TOKENS
        pages = np.full((length // self._window, self._window), self._tokens.specials.pad, np.int32)
        pages[:, : len(start)] = start
        stop = len(start) + room * RECORD_TOKENS
        pages[:, len(start) : stop] = self._records(len(pages) * room).reshape(len(pages), room * RECORD_TOKENS)
        return [Episode(pages.reshape(-1), self._probes)]

    def _records(self, count: int) -> Ids:
        """The first ``count`` records, int32 (count, 10)."""
        if len(self._table) < count:
            symbols, seed = self._tokens.symbols, self._settings.seed
            keys = distinct(count, len(symbols) ** 4, [seed, _KEYS])
            values = np.random.default_rng([seed, _VALUES]).integers(len(symbols), size=(count, 4))
            table = np.empty((count, RECORD_TOKENS), np.int32)
            table[:, 0], table[:, 5] = self._tokens.key, self._tokens.value
            table[:, 1:5] = symbols[np.stack(np.unravel_index(keys, (len(symbols),) * 4), axis=1)]
            table[:, 6:] = symbols[values]
            self._table = table
        return self._table[:count]


def distinct(count: int, below: int, seed: list[int]) -> npt.NDArray[np.int64]:
    """The first ``count`` different numbers of a random stream below ``below``: more of them begin with the same."""
    drawn = 2 * count
    while True:
        stream = np.random.default_rng(seed).integers(below, size=drawn)
        first = np.unique(stream, return_index=True)[1]
        if len(first) >= count:
            return stream[np.sort(first)[:count]]
        drawn *= 2


def _probes(records: Ids, question: int, most: int) -> tuple[Probe, ...]:
    """Windows of ``most`` questions each."""
    asked = records.copy()
    asked[:, 0] = question
    parts = [asked[start : start + most] for start in range(0, len(asked), most)]
    return tuple(
        Probe(part.reshape(-1), tuple((row * RECORD_TOKENS + 6, (row + 1) * RECORD_TOKENS) for row in range(len(part))))
        for part in parts
    )
