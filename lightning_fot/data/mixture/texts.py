"""Sources of a mixture that are read from files: text, and conversations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import numpy as np

from lightning_fot.config.sources import InstructionsSettings, TextSettings
from lightning_fot.data.mixture.base import MixtureSource
from lightning_fot.data.mixture.conversations import Conversation, Template, find_conversations
from lightning_fot.data.rows.sequences import MadeSequence, Mask, Specials, TextSequence, TokenSequence
from lightning_fot.data.text.documents import Corpus, Document, Item
from lightning_fot.data.text.selection import Selection, SelectionSettings
from lightning_fot.data.text.tokens import Ids, TextEncoder
from lightning_fot.errors import SettingError


def text_sequence(item: Item, ids: Ids, specials: Specials) -> TextSequence:
    """An item with the start and the end token, where the document itself starts and ends."""
    before = specials.bos if item.start == 0 else None
    after = specials.eos if item.stop is None else None
    sequence = TextSequence(ids, before, after, item.source.keys)
    sequence.name = item.source.name
    return sequence


class TextSource(MixtureSource):
    """Files and folders, selected and split as ``data.paths`` are.

    Args:
        settings: What to read; what it leaves open has been filled in.
        encoder: Text to ids.
        seed: Of the held-out draw and of the order; pass n is shuffled with seed + n.
        say: Called with what users should know.

    Raises:
        SettingError: No text, or none that is long enough.
    """

    def __init__(self, settings: TextSettings, encoder: TextEncoder, seed: int, say: Callable[[str], None]) -> None:
        super().__init__(settings.setting, settings.weight, settings.passes)
        self._specials = Specials.of(encoder.tokenizer)
        self._paths = settings.paths
        self.corpus = Corpus(encoder, settings.min_tokens or 1, settings.max_document_tokens)
        self._selection = Selection(
            SelectionSettings(
                settings.paths,
                settings.heldout,
                settings.heldout_fraction or 0.1,
                settings.max_documents,
                settings.max_tokens,
                settings.text_field or "text",
                seed,
                settings.setting,
            ),
            self.corpus,
            say,
        )

    def documents(self, number: int) -> Iterator[TokenSequence]:
        """Training documents, shuffled anew in each pass."""
        return self._sequences(self._selection.one_pass(number))

    def heldout(self) -> Iterator[TokenSequence]:
        """Held-out documents in their seeded order."""
        return self._sequences(self._selection.heldout)

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """The same as text."""
        return self._selection.heldout_documents(min_tokens)

    @property
    def heldout_keys(self) -> frozenset[Hashable]:
        """Files and lines that are held out; none where one document is split by position."""
        train = {item.source for item in self._selection.train}
        return frozenset().union(*(item.source.keys for item in self._selection.heldout if item.source not in train))

    def leave_out(self, keys: frozenset[Hashable]) -> None:
        """Take documents that another source holds out out of training."""
        if self._selection.leave_out(keys) and not self._selection.train:
            raise SettingError(
                f"{self.setting}.paths", self._paths, "has no document that no other source holds out", "Name others."
            )

    def check_training(self) -> None:
        """Refuse to train on nothing: every document may be held out."""
        self._selection.check_training()

    @property
    def count(self) -> int:
        """Training documents at most: some may turn out to be too short."""
        return len(self._selection.train)

    @property
    def most_tokens(self) -> int:
        """A token a byte, and the special ones."""
        return sum(item.source.size + 3 for item in self._selection.train)

    @property
    def mark(self) -> object:
        """The documents, and what cuts them."""
        corpus = self.corpus
        return corpus.min_tokens, corpus.max_document_tokens, self.weight, self.passes, self._selection.mark

    def _sequences(self, items: list[Item]) -> Iterator[TokenSequence]:
        for item, ids in self.corpus.in_order(items):
            if ids is not None and len(ids):
                yield text_sequence(item, ids, self._specials)


class InstructionsSource(MixtureSource):
    """Conversations; those that spell out a control token are left out.

    Args:
        settings: What to read; what it leaves open has been filled in.
        encoder: Text to ids.
        seed: Of the held-out draw and of the order.
        say: Called with what users should know.

    Raises:
        SettingError: No conversation, a line that is none, or no chat template.
    """

    def __init__(
        self, settings: InstructionsSettings, encoder: TextEncoder, seed: int, say: Callable[[str], None]
    ) -> None:
        super().__init__(settings.setting, settings.weight, settings.passes)
        self._settings = settings
        self._encoder = encoder
        self._seed = seed
        self._say = say
        self._template = Template(encoder, settings.chat_template, settings.setting)
        found = find_conversations(settings)
        order = np.random.default_rng(seed).permutation(len(found)).tolist()
        held = min(max(1, round(len(found) * (settings.heldout_fraction or 0.1))), len(found) - 1)
        self._heldout = [found[number] for number in sorted(order[:held])]
        self._train = [found[number] for number in sorted(order[held:])]
        self._template.encode(self._train[0])  # a template that refuses conversations is told now
        say(f"Conversations of {settings.setting}: {len(self._train):,} for training, {held:,} held out.")

    def documents(self, number: int) -> Iterator[TokenSequence]:
        """Training conversations, shuffled anew in each pass."""
        order = np.random.default_rng(self._seed + number).permutation(len(self._train)).tolist()
        return self._sequences([self._train[place] for place in order])

    def heldout(self) -> Iterator[TokenSequence]:
        """Held-out conversations."""
        return self._sequences(self._heldout)

    @property
    def heldout_keys(self) -> frozenset[Hashable]:
        """Lines that are held out."""
        return frozenset().union(*(one.keys for one in self._heldout))

    def leave_out(self, keys: frozenset[Hashable]) -> None:
        """Take conversations that another source holds out out of training."""
        self._train = [one for one in self._train if one.keys.isdisjoint(keys)]
        if not self._train:
            raise SettingError(
                f"{self.setting}.paths",
                self._settings.paths,
                "has no conversation that no other source holds out",
                "Name others.",
            )

    @property
    def count(self) -> int:
        """Training conversations at most."""
        return len(self._train)

    @property
    def mark(self) -> object:
        """The lines, and the settings."""
        return repr(self._settings), self._seed, [(one.path, one.offset, one.size) for one in self._train]

    def _sequences(self, conversations: list[Conversation]) -> Iterator[TokenSequence]:
        left_out = 0
        for conversation, encoded in self._encoder.in_order(self._encode, conversations):
            if encoded is None:
                left_out += 1
            elif len(encoded[0]) >= (self._settings.min_tokens or 2):
                yield _made(conversation, *encoded)
        if left_out:
            self._say(f"Left out of {self.setting}: {left_out:,} conversations that spell out control tokens.")

    def _encode(self, conversation: Conversation) -> tuple[Conversation, tuple[Ids, Mask] | None]:
        return conversation, self._template.encode(conversation)


def _made(conversation: Conversation, ids: Ids, targets: Mask) -> MadeSequence:
    sequence = MadeSequence(len(ids), lambda: (ids, targets), conversation.keys)
    sequence.name = f"{conversation.path}, byte {conversation.offset}"
    return sequence
