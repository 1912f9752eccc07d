"""The dictionary lookup task of the Focused Transformer paper (arXiv 2307.03170, appendix): learn records, then recall.

A record is ``<k> k1 k2 k3 k4 <v> v1 v2 v3 v4``, a question ``<q> k1 k2 k3 k4 <v> v1 v2 v3 v4``. The first half of a
document defines records, the second half asks for them; the loss counts v1 to v4 of the questions and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_fot.config.sources import MARKERS, RECORD_TOKENS, DictionarySettings
from lightning_fot.data.mixture.base import HELDOUT_DOCUMENTS, MixtureSource
from lightning_fot.data.rows.sequences import MadeSequence, Mask, Specials, TokenSequence
from lightning_fot.data.text.documents import Document
from lightning_fot.data.text.token_cache import Ids
from lightning_fot.errors import SettingError

# Held-out documents that are given to tasks.
_DOCUMENTS = 256

Symbols = npt.NDArray[np.int32]


@dataclass(frozen=True)
class DictionaryTokens:
    """The ids that stand for the task's tokens.

    Args:
        key: ``<k>``.
        value: ``<v>``.
        question: ``<q>``.
        symbols: int32 (symbols,), what keys and values are made of.
        specials: Start and end of a document; the padding fills what a half has left over.
    """

    key: int
    value: int
    question: int
    symbols: Symbols
    specials: Specials

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int, setting: str = "vocabulary") -> DictionaryTokens:
        """The lowest ``vocabulary`` ids that are no control tokens: three markers, and symbols.

        Raises:
            SettingError: The tokenizer has fewer.
        """
        specials = Specials.of(tokenizer)
        taken = {specials.bos, specials.eos, specials.pad, *getattr(tokenizer, "all_special_ids", ())}
        ids = [number for number in range(len(tokenizer.get_vocab())) if number not in taken][:vocabulary]
        if len(ids) < vocabulary:
            raise SettingError(setting, vocabulary, f"the tokenizer has {len(ids)} usable tokens", "Lower it.")
        return cls(ids[0], ids[1], ids[2], np.asarray(ids[MARKERS:], np.int32), specials)


def draw_keys(count: int, symbols: int, random: np.random.Generator, similar: float = 0.0) -> Symbols:
    """Different keys, as numbers of symbols.

    Args:
        count: How many.
        symbols: Symbols to draw from.
        random: Draws them.
        similar: Share of the keys that are an earlier one with one symbol changed.

    Returns:
        int32 (count, 4), each number below ``symbols``.
    """
    keys: dict[tuple[int, ...], None] = {}
    while len(keys) < count:
        if keys and random.random() < similar:
            key = list(list(keys)[int(random.integers(len(keys)))])
            key[int(random.integers(4))] = int(random.integers(symbols))
        else:
            key = random.integers(symbols, size=4).tolist()
        keys.setdefault(tuple(key))
    return np.array(list(keys), np.int32)


def crowded_keys(count: int, symbols: int, few: int, random: np.random.Generator) -> Symbols:
    """Different keys that lie close together: each place has ``few`` of the symbols, drawn for that place.

    Args:
        count: How many; at most ``few ** 4``.
        symbols: Symbols there are.
        few: Symbols that a place can have.
        random: Draws them.

    Returns:
        int32 (count, 4), each number below ``symbols``.
    """
    places = np.stack([random.permutation(symbols)[:few] for _ in range(4)])
    chosen = np.unravel_index(random.choice(few**4, size=count, replace=False), (few,) * 4)
    return np.stack([place[digit] for place, digit in zip(places, chosen, strict=True)], axis=1).astype(np.int32)


def dictionary_document(
    tokens: DictionaryTokens,
    n_tokens: int,
    keys: Symbols,
    random: np.random.Generator,
    ask: Literal["all", "first"] = "all",
) -> tuple[Ids, Mask]:
    """One document: its first half defines records, its second half asks for them.

    Every record is defined once before one is defined again, and likewise asked.

    Args:
        tokens: The task's tokens.
        n_tokens: Tokens of the document, the specials included; halves are filled up with padding.
        keys: Of the records, as numbers of symbols, int32 (records, 4), different from each other; no more records
            than a half holds.
        random: Draws values and order.
        ask: Which questions the loss counts: ``all``, or the ``first`` about each record.

    Returns:
        Ids int32 (n_tokens,), and which of them the loss counts, bool (n_tokens,).
    """
    records = len(keys)
    values = tokens.symbols[random.integers(len(tokens.symbols), size=(records, 4))]
    table = np.empty((records, RECORD_TOKENS), np.int32)
    table[:, 0], table[:, 1:5] = tokens.key, tokens.symbols[keys]
    table[:, 5], table[:, 6:] = tokens.value, values
    specials = tokens.specials
    ids = np.full(n_tokens, specials.pad, np.int32)
    targets = np.zeros(n_tokens, np.bool_)
    middle = n_tokens // 2
    starts = 0 if specials.bos is None else 1
    ends = n_tokens if specials.eos is None else n_tokens - 1
    if specials.bos is not None:
        ids[0] = specials.bos
    if specials.eos is not None:
        ids[-1] = specials.eos
    for begin, end, asks in ((starts, middle, False), (middle, ends, True)):
        room = (end - begin) // RECORD_TOKENS
        rounds = [random.permutation(records) for _ in range(-(-room // records))]
        chosen = table[np.concatenate(rounds)[:room]]
        stop = begin + room * RECORD_TOKENS
        if asks:
            chosen[:, 0] = tokens.question
            counted = room if ask == "all" else min(room, records)
            targets[begin:stop].reshape(room, RECORD_TOKENS)[:counted, 6:] = True
        ids[begin:stop] = chosen.reshape(-1)
    return ids, targets


class DictionarySource(MixtureSource):
    """Dictionary documents without end; document i is a function of the seeds and i.

    Args:
        settings: What they are like.
        tokenizer: Gives the ids.
        seed: The data module's.
    """

    made = True

    def __init__(self, settings: DictionarySettings, tokenizer: Any, seed: int) -> None:
        super().__init__(settings.setting, settings.weight)
        self._settings = settings
        self._tokenizer = tokenizer
        self._seed = seed
        self._tokens = DictionaryTokens.of(tokenizer, settings.vocabulary, f"{settings.setting}.vocabulary")

    def documents(self, number: int) -> Iterator[TokenSequence]:
        """All of them: there is one pass."""
        index = 0
        while True:
            yield self._document(index)
            index += 1

    def heldout(self) -> Iterator[TokenSequence]:
        """Some that are drawn apart, with the last number of records."""
        return (self._document(index, heldout=True) for index in range(HELDOUT_DOCUMENTS))

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """The same, and as many more as there may be at once in a memory."""
        if self._settings.tokens >= min_tokens:
            for index in range(_DOCUMENTS):
                ids, _ = self._document(index, heldout=True).read(0, self._settings.tokens)
                yield Document(f"{self._settings.setting}, held out {index}", ids, self._tokenizer)

    def records(self, index: int) -> int:
        """Distinct records of document ``index``."""
        settings = self._settings
        if not isinstance(settings.records, list):
            return settings.room if settings.records is None else settings.records
        legs, total = len(settings.records) - 1, settings.grow_documents
        leg, along = divmod(min(index, total) * legs, total)
        if leg == legs:
            return settings.records[-1]
        first, last = settings.records[leg : leg + 2]
        return first + (last - first) * along // total

    @property
    def mark(self) -> object:
        """Its settings."""
        return repr(self._settings), self._seed

    def _document(self, index: int, heldout: bool = False) -> TokenSequence:
        records = self.records(self._settings.grow_documents if heldout else index)

        def make() -> tuple[Ids, Mask]:
            random = np.random.default_rng([self._seed, self._settings.seed, int(heldout), index])
            settings, symbols = self._settings, len(self._tokens.symbols)
            if settings.key_symbols is None:
                keys = draw_keys(records, symbols, random, settings.similar)
            else:
                keys = self._crowded(settings.key_symbols, index, heldout)[:records]
            return dictionary_document(self._tokens, settings.tokens, keys, random, settings.ask)

        return MadeSequence(self._settings.tokens, make)

    def _crowded(self, few: int, index: int, heldout: bool) -> Symbols:
        """As many keys as document ``index`` can have, of those of its group."""
        settings, most = self._settings, self._settings.most_records
        group, place = divmod(index, settings.key_documents)
        # The seed has five numbers, a document's has four: the draws are apart.
        random = np.random.default_rng([self._seed, settings.seed, int(heldout), group, few])
        keys = crowded_keys(settings.key_documents * most, len(self._tokens.symbols), few, random)
        return keys[place * most : (place + 1) * most]
