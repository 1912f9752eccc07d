"""Which documents are trained on, which are held out, and in which order they are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Set
from dataclasses import dataclass

import numpy as np

from lightning_fot.data.text.documents import Corpus, Document, Item, cut_into_parts, split_documents
from lightning_fot.data.text.parts import DocumentSource, Found
from lightning_fot.data.text.readers import find_documents, too_short
from lightning_fot.errors import SettingError

_FEW_DOCUMENTS = 32


@dataclass(frozen=True)
class SelectionSettings:
    """The arguments of ``CrossbatchDataModule`` that choose documents; see there. ``prefix`` is where they were set."""

    paths: list[str] | None
    heldout: list[str] | None
    heldout_fraction: float
    max_documents: int | None
    max_tokens: int | None
    text_field: str
    seed: int
    prefix: str = "data"


class Selection:
    """Documents found and split once, then ordered for any number of streams and any epoch.

    Args:
        settings: What to choose from, and how.
        corpus: Encodes documents; where there are few, each is checked to be long enough now.
        say: Called with what users should know.

    Raises:
        SettingError: No text, or none that is long enough.
    """

    def __init__(self, settings: SelectionSettings, corpus: Corpus, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._corpus = corpus
        self._whole = corpus.whole()  # keeps what is encoded, so one for all evaluations
        self._say = say
        self._items: dict[int, list[Item]] = {}
        self.train: list[Item] = []
        self.heldout: list[Item] = []
        self._select()
        self.heldout = _shuffled(self.heldout, settings.seed)

    def order(self, streams: int, epoch: int) -> list[Item]:
        """Training items in the order in which ``streams`` take them.

        Shuffled with seed + epoch; only those so long that they would run on alone at the end go first.
        """
        if streams not in self._items:
            self._items[streams] = self.fill(self._limited(), streams)
        items = _shuffled(self._items[streams], self._settings.seed + epoch)
        long = sum(self._estimate(item) for item in items) / streams / 2
        return sorted(items, key=lambda item: self._estimate(item) <= long)

    def one_pass(self, number: int) -> list[Item]:
        """Training items in the order of pass ``number``, shuffled with seed + number; none of them cut into parts."""
        if 0 not in self._items:
            self._items[0] = self._limited()
        return _shuffled(self._items[0], self._settings.seed + number)

    def check_training(self) -> None:
        """Refuse to train on nothing. What is only evaluated may hold out every document.

        Raises:
            SettingError: All documents are held out.
        """
        if not self.train:
            raise SettingError(
                f"{self._settings.prefix}.heldout",
                self._settings.heldout,
                "leaves no document for training",
                "Name other files, or evaluate alone with trainer.max_steps=0.",
            )

    def leave_out(self, keys: Set[Hashable]) -> int:
        """Take documents with one of these keys, held out elsewhere, out of training; returns how many they were."""
        kept = [item for item in self.train if item.source.keys.isdisjoint(keys)]
        left_out = len(self.train) - len(kept)
        self.train = kept
        self._items.clear()
        return left_out

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """Held-out documents of at least so many tokens, whole, each encoded when it is asked for."""
        for item in self.heldout:
            # One token a byte is the most there can be.
            if item.source.size + 1 < min_tokens:
                continue
            ids = self._whole.ids(item)
            if ids is not None and len(ids) >= min_tokens:
                yield Document(item.source.name, ids, self._whole.encoder.tokenizer)

    @property
    def mark(self) -> list[tuple[str, int, int, int | None]]:
        """The training documents: equal marks mean equal text, as far as names and sizes tell."""
        return [(item.source.name, item.source.size, item.start, item.stop) for item in self.train]

    def fill(self, items: list[Item], streams: int) -> list[Item]:
        """``items``, cut into parts when there are fewer than streams to read them."""
        if len(items) > max(_FEW_DOCUMENTS, streams):
            return items
        usable = [(item, len(ids)) for item in items if (ids := self._corpus.ids(item)) is not None]
        if not usable or len(usable) >= streams:
            return [item for item, _ in usable]
        self._say(
            f"There are fewer documents ({len(usable):,}) than are read side by side ({streams:,}): they are cut into "
            "parts, so negatives may come from the same document."
        )
        parts = []
        for number, start, stop in cut_into_parts([length for _, length in usable], streams):
            item, length = usable[number]
            end = item.stop if stop == length else item.start + stop
            parts.append(Item(item.source, item.start + start, end))
        return parts

    def _select(self) -> None:
        settings = self._settings
        paths, given = f"{settings.prefix}.paths", f"{settings.prefix}.heldout"
        found = find_documents(
            settings.paths, text_field=settings.text_field, max_documents=settings.max_documents, setting=paths
        )
        if found.skipped:
            self._say(f"Left out: {found.skipped_text()}.")
        if settings.heldout is not None:
            other = find_documents(settings.heldout, text_field=settings.text_field, setting=given)
            self._leave_out(found, other.documents)
            heldout = self._long_enough(other.documents, given, settings.heldout)
            train = self._long_enough(self._draw(found.documents), paths, settings.paths) if found.documents else []
            self.train, self.heldout = [Item(one) for one in train], [Item(one) for one in heldout]
        else:
            sources = self._long_enough(self._draw(found.documents), paths, settings.paths)
            if not self._split(sources):
                # Bytes promised more than there are tokens: look at every document.
                self._split(self._long_enough(sources, paths, settings.paths, exactly=True))
            if self.train[0].source == self.heldout[0].source:
                return
        size = sum(item.source.size for item in self.train) / 1e6
        name = "the Python standard library" if settings.paths is None else paths
        self._say(
            f"Documents of {name}: {len(self.train):,} for training ({size:,.1f} MB), {len(self.heldout):,} held out."
        )

    def _split(self, sources: list[DocumentSource]) -> bool:
        """Split the sources; False when every document on one side turns out to be too short."""
        if len(sources) == 1:
            self._split_by_position(sources[0])
            return True
        train, heldout = split_documents(
            [one.size for one in sources], self._settings.heldout_fraction, self._settings.seed
        )
        self.train, self.heldout = [Item(sources[number]) for number in train], [Item(sources[n]) for n in heldout]
        return all(any(self._corpus.is_long_enough(item) for item in side) for side in (self.train, self.heldout))

    def _split_by_position(self, source: DocumentSource) -> None:
        minimum = self._corpus.min_tokens
        ids = self._corpus.ids(Item(source))
        count = 0 if ids is None else len(ids)
        held = max(round(count * self._settings.heldout_fraction), minimum)
        if count - held < minimum:
            raise SettingError(
                f"{self._settings.prefix}.paths",
                self._settings.paths,
                f"is one document of {count:,} tokens, too short for a training and a held-out part of {minimum:,} "
                "tokens each",
                f"Add documents, name {self._settings.prefix}.heldout, or lower {self._settings.prefix}.min_tokens or "
                "model.memory.window.",
            )
        self.train, self.heldout = [Item(source, 0, count - held)], [Item(source, count - held)]
        self._say(
            f"There is one document, {source.name}: its first {count - held:,} tokens are for training, the last "
            f"{held:,} held out."
        )

    def _draw(self, sources: list[DocumentSource]) -> list[DocumentSource]:
        limit = self._settings.max_documents
        if limit is None or len(sources) <= limit:
            return sources
        # Documents that cannot be long enough would use up the draw.
        able = [one for one in sources if self._corpus.may_be_long_enough(one)] or sources
        chosen = np.random.default_rng(self._settings.seed).permutation(len(able))[:limit]
        return [able[number] for number in sorted(chosen.tolist())]

    def _leave_out(self, found: Found, heldout: list[DocumentSource]) -> None:
        """Take documents that share a file or line with a held-out one out of training."""
        prefix = self._settings.prefix
        taken = {part.key for one in heldout for part in one.parts}
        kept = [one for one in found.documents if not any(part.key in taken for part in one.parts)]
        if len(kept) < len(found.documents):
            left_out = len(found.documents) - len(kept)
            self._say(f"{left_out:,} documents of {prefix}.paths are held out by {prefix}.heldout.")
        found.documents = kept

    def _long_enough(
        self, sources: list[DocumentSource], setting: str, value: object, exactly: bool = False
    ) -> list[DocumentSource]:
        """Sources without those that are too short; where there are many, only what their bytes tell."""
        minimum = self._corpus.min_tokens
        kept = [one for one in sources if self._corpus.may_be_long_enough(one)]
        if exactly or len(kept) <= _FEW_DOCUMENTS:
            kept = [one for one in kept if self._corpus.is_long_enough(Item(one), exactly)]
        if not kept:
            longest = max(one.size for one in sources)
            raise too_short(setting, value, len(sources), minimum, f"the longest has {longest:,} bytes")
        if len(kept) < len(sources):
            self._say(f"Left out: {len(sources) - len(kept):,} documents shorter than {minimum:,} tokens.")
        return kept

    def _limited(self) -> list[Item]:
        """Training items up to ``max_tokens``; the last one is cut to fit."""
        if self._settings.max_tokens is None:
            return self.train
        kept: list[Item] = []
        left = self._settings.max_tokens
        for item in _shuffled(self.train, self._settings.seed):
            ids = self._corpus.ids(item)
            if ids is None:
                continue
            if len(ids) > left:
                if left >= self._corpus.min_tokens or not kept:
                    kept.append(Item(item.source, item.start, item.start + left))
                break
            kept.append(item)
            left -= len(ids)
        return kept

    def _estimate(self, item: Item) -> int:
        """About how many tokens an item has, without reading it."""
        size = item.source.size // 4
        if self._corpus.max_document_tokens is not None:
            size = min(size, self._corpus.max_document_tokens)
        return (size if item.stop is None else item.stop) - item.start


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    return [items[number] for number in np.random.default_rng(seed).permutation(len(items)).tolist()]
