"""Documents as token ids, and their split into training and held-out ones."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightning_fot.data.text.parts import DocumentSource
from lightning_fot.data.text.tokens import Ids, TextEncoder

# Above this size all documents count as equally long in the split: 128 kB are about 32k tokens.
LONG_BYTES = 128 * 1024
# From this size on, ids are read from disk as they are used.
LARGE_DOCUMENT_BYTES = 16 * 1024 * 1024
_KEPT_TOKENS = 32 * 1024 * 1024
# Documents up to this size are encoded side by side, a few ahead; the pieces of longer ones are anyway.
_AHEAD_BYTES = 1024 * 1024
# Text with more bytes a token than this is hardly text; documents so long are not encoded only to be measured.
_BYTES_PER_TOKEN = 32


@dataclass(frozen=True)
class Item:
    """A document, or the stretch of it from token ``start`` to ``stop`` (None: to its end)."""

    source: DocumentSource
    start: int = 0
    stop: int | None = None


class Document:
    """A held-out document.

    Args:
        name: Where it came from.
        ids: Token ids without special tokens, int32 of shape (tokens,).
        tokenizer: Used to give the text back.
    """

    def __init__(self, name: str, ids: Ids, tokenizer: Any) -> None:
        self.name = name
        self.ids = ids
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {len(self):,} tokens)"

    @cached_property
    def text(self) -> str:
        """The text of ``ids``."""
        return str(self._tokenizer.decode(self.ids.tolist(), clean_up_tokenization_spaces=False))


class Corpus:
    """Gives items as ids, encoded when first asked for; counts what it leaves out.

    Args:
        encoder: Text to ids.
        min_tokens: Items with fewer ids are left out.
        max_document_tokens: Documents are cut after so many ids; None keeps them whole.
        large_bytes: From this size on, the ids of a document stay on disk.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        min_tokens: int,
        max_document_tokens: int | None = None,
        large_bytes: int = LARGE_DOCUMENT_BYTES,
    ) -> None:
        self.encoder = encoder
        self.min_tokens = min_tokens
        self.max_document_tokens = max_document_tokens
        self._large_bytes = large_bytes
        self.skipped: Counter[str] = Counter()
        self.short: set[str] = set()
        self.cut: set[str] = set()
        self._kept: OrderedDict[DocumentSource, Ids] = OrderedDict()
        self._kept_tokens = 0
        self._read: set[DocumentSource] = set()

    def ids(self, item: Item) -> Ids | None:
        """Ids of ``item`` without special tokens, int32 (tokens,); None when it is too short."""
        return self._long_enough(item, self._source_ids(item.source) if self.may_be_long_enough(item.source) else None)

    def whole(self) -> Corpus:
        """The same documents, none of them cut."""
        if self.max_document_tokens is None:
            return self
        return Corpus(self.encoder, self.min_tokens, None, self._large_bytes)

    def in_order(self, items: Iterable[Item]) -> Iterator[tuple[Item, Ids | None]]:
        """Items with their ``ids``, encoded in threads, a few ahead of what is taken."""
        for item, encoded in self.encoder.in_order(self._ahead, items):
            if encoded is not None and item.source not in self._kept:
                self._keep(item.source, *encoded)
            yield item, self.ids(item)

    def _long_enough(self, item: Item, ids: Ids | None) -> Ids | None:
        if ids is None or len(ids) < self.min_tokens:
            self.short.add(item.source.name)
            return None
        return ids[item.start : item.stop]

    def may_be_long_enough(self, source: DocumentSource) -> bool:
        """What the size tells: one token a byte is the most, one more where a tokenizer puts a space before."""
        return source.size + 1 >= self.min_tokens

    def is_long_enough(self, item: Item, exactly: bool = False) -> bool:
        """Whether ``ids`` would give something; very long documents are trusted without being encoded."""
        if not exactly and item.source.size >= _BYTES_PER_TOKEN * self.min_tokens:
            return True
        return self.ids(item) is not None

    def _source_ids(self, source: DocumentSource) -> Ids:
        if source in self._kept:
            self._kept.move_to_end(source)
            return self._kept[source]
        skipped: Counter[str] = Counter()
        if self._is_large(source):
            ids, cut = self.encoder.encode_on_disk(lambda: source.pieces(_emptied(skipped))), False
            if self.max_document_tokens is not None and len(ids) > self.max_document_tokens:
                ids, cut = ids[: self.max_document_tokens], True
        else:
            ids, cut = self.encoder.encode(source.pieces(skipped), self.max_document_tokens)
        self._keep(source, ids, cut, skipped)
        return ids

    def _ahead(self, item: Item) -> tuple[Item, tuple[Ids, bool, Counter[str]] | None]:
        """An item with what can be encoded ahead of its turn; runs in several threads, so nothing is changed here."""
        source = item.source
        if source in self._kept or source.size > _AHEAD_BYTES or not self.may_be_long_enough(source):
            return item, None
        skipped: Counter[str] = Counter()
        ids, cut = self.encoder.encode_alone(source.pieces(skipped), self.max_document_tokens)
        return item, (ids, cut, skipped)

    def _is_large(self, source: DocumentSource) -> bool:
        # The beginning of a large document is read from the beginning of its text alone.
        limit = self.max_document_tokens
        return source.size >= self._large_bytes and (limit is None or limit * 4 >= self._large_bytes)

    def _keep(self, source: DocumentSource, ids: Ids, cut: bool, skipped: Counter[str]) -> None:
        if source not in self._read:
            self.skipped += skipped
            self._read.add(source)
        if cut:
            self.cut.add(source.name)
        self._kept[source] = ids
        self._kept_tokens += _tokens_in_memory(ids)
        while self._kept_tokens > _KEPT_TOKENS and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_tokens -= _tokens_in_memory(dropped)


def _emptied(counter: Counter[str]) -> Counter[str]:
    """For text that is read twice, so that what is left out is counted once."""
    counter.clear()
    return counter


def _tokens_in_memory(ids: Ids) -> int:
    return 0 if isinstance(ids, np.memmap) else len(ids)


def split_documents(sizes: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Choose held-out documents, by size so that both sides hold short and long ones.

    Documents are sorted by size and cut into groups of ``1 / fraction`` neighbours; one of each group, drawn with
    ``seed``, is held out. In the group of the longest, only documents at least half as long as the longest one (or as
    128 kB, if that is less) are drawn from: when there are long documents, a long one is held out.

    Args:
        sizes: Bytes of each document.
        fraction: Share of the documents to hold out, in (0, 1); at least one is, and at least one is not.
        seed: Of the draw.

    Returns:
        Numbers of the training and of the held-out documents, ascending; the two are disjoint and together all.
    """
    count = len(sizes)
    if count < 2:
        return list(range(count)), []
    random = np.random.default_rng(seed)
    order = sorted(range(count), key=lambda number: (-sizes[number], number))
    groups = min(max(1, round(count * fraction)), count - 1)
    heldout = []
    for group, members in enumerate(np.array_split(np.asarray(order), groups)):
        candidates = members.tolist()
        if group == 0:
            enough = min(sizes[order[0]], LONG_BYTES) / 2
            candidates = [number for number in candidates if sizes[number] >= enough]
        heldout.append(candidates[int(random.integers(len(candidates)))])
    chosen = set(heldout)
    return [number for number in range(count) if number not in chosen], sorted(chosen)


def cut_into_parts(lengths: Sequence[int], parts: int) -> list[tuple[int, int, int]]:
    """Cut documents so that there are at least ``parts`` stretches, halving the longest each time.

    Args:
        lengths: Tokens of each document.
        parts: Stretches wanted.

    Returns:
        (document, start, stop) of each stretch: together every token once, none of one token or less.
    """
    stretches = [(number, 0, length) for number, length in enumerate(lengths)]
    while len(stretches) < parts:
        longest = max(range(len(stretches)), key=lambda one: stretches[one][2] - stretches[one][1])
        number, start, stop = stretches[longest]
        if stop - start < 4:
            break
        middle = (start + stop) // 2
        stretches[longest : longest + 1] = [(number, start, middle), (number, middle, stop)]
    return stretches
