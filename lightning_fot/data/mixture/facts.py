"""Facts told in real text and asked for later, and passages quoted again: what teaches a memory to tell keys apart.

A document of ``facts`` tells names and values in many templates between stretches of real text, and asks for them in
its last ``ask_tokens``, in the words they were told in and in others. Facts of one document share relations, so that
only the name tells them apart, and so do documents that follow each other: in a crossbatch the other rows hold near
misses. A document of ``recall`` is real text whose passages are quoted again at its end. The loss counts what only
the earlier windows tell: answers, and how quotations go on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_fot.config.sources import FactsSettings, RecallSettings
from lightning_fot.data.mixture.base import MadeSource, SettingsT
from lightning_fot.data.mixture.dialogues import dialogue, question_of
from lightning_fot.data.mixture.fact_templates import RELATIONS, Relation, with_name
from lightning_fot.data.mixture.passkey import continuation
from lightning_fot.data.rows.sequences import Mask, Specials
from lightning_fot.data.text.readers import find_documents
from lightning_fot.data.text.token_cache import Ids
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError

# Real text kept: a training of some hundred documents hardly ever sees a stretch twice, and starts at once.
_MOST_TOKENS = 400_000
_SEPARATORS = ("\n", " ", "\n\n")
# A quotation begins with so many tokens that the loss does not count: they say which passage it is.
CUE_TOKENS = 8


@dataclass(frozen=True)
class Fact:
    """One fact.

    Args:
        told: The sentence up to the value, in which it is told and may be asked.
        asked: The question in other words.
        value: What follows both, with its leading space.
        after: Ends the sentence.
    """

    told: str
    asked: str
    value: str
    after: str


def draw_facts(documents: int, count: int, relations: int, seed: int) -> list[list[Fact]]:
    """Facts of documents that are read side by side: no two say different things of one name.

    Args:
        documents: How many.
        count: Facts of each.
        relations: Relations that they share; the fewer, the more alike facts are.
        seed: Of the draw.
    """
    draw = random.Random(seed)
    chosen = draw.sample(RELATIONS, min(relations, len(RELATIONS)))
    taken: set[str] = set()
    result = []
    for _ in range(documents):
        # Each relation tells its facts of a document in the same words most of the time.
        frames = {id(one): draw.choice(one.told) for one in chosen}
        facts = []
        for number in range(count):
            relation = chosen[number % len(chosen)]
            frame = frames[id(relation)] if draw.random() < 0.8 else draw.choice(relation.told)
            facts.append(_draw_fact(relation, frame, taken, draw))
        draw.shuffle(facts)
        result.append(facts)
    return result


def _draw_fact(relation: Relation, frame: str, taken: set[str], draw: random.Random) -> Fact:
    for attempt in itertools.count():
        name = relation.key(draw)
        # Names are few for some relations: after many attempts one comes again.
        if name not in taken or attempt > 200:
            break
    taken.add(name)
    asked = with_name(draw.choice(relation.asked), name)
    value = relation.value(draw)
    return Fact(with_name(frame, name), asked, f" {value}", relation.after)


class RealText:
    """Stretches of real text, drawn anywhere in files.

    Args:
        paths: Files and folders; None takes the standard library's sources.
        encoder: Text to ids.
        setting: Name of the setting in errors.
        least: Tokens that there must be.

    Raises:
        SettingError: There is no text, or too little.
    """

    def __init__(self, paths: list[str] | None, encoder: TextEncoder, setting: str, least: int) -> None:
        found = find_documents(paths, setting=setting)
        parts: list[Ids] = []
        left = _MOST_TOKENS
        for source in found.documents:
            if left <= 0:
                break
            # One long file must not keep the others out.
            ids, _ = encoder.encode(source.pieces(found.skipped), max(1, min(left, _MOST_TOKENS // 4)))
            parts.append(ids)
            left -= len(ids)
        self.ids: Ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if len(self.ids) < least:
            raise SettingError(setting, paths, f"has {len(self.ids):,} of {least:,} tokens", "Add more text.")

    def stretch(self, tokens: int, draw: random.Random) -> list[int]:
        """``tokens`` ids that follow each other."""
        start = draw.randrange(len(self.ids) - tokens + 1)
        return [int(token) for token in self.ids[start : start + tokens]]


def facts_document(
    facts: Sequence[Fact],
    text: RealText,
    tokenizer: Any,
    n_tokens: int,
    ask_tokens: int,
    other: float,
    seed: int,
    chat: bool = False,
) -> tuple[Ids, Mask]:
    """One document: facts between stretches of text, then questions about as many of them as there is room for.

    Args:
        facts: What is told; those that find no room are left out.
        text: What stands between them.
        tokenizer: A Hugging Face tokenizer.
        n_tokens: Tokens of the document.
        ask_tokens: Of these, tokens of questions at its end.
        other: Share of the questions that are asked in other words.
        seed: Of order and stretches.
        chat: Whether a user asks an assistant, in the tokenizer's chat template and in other words; facts that are
            asked for by no question are left out.

    Returns:
        Ids int32 (n_tokens,), and which of them the loss counts, bool (n_tokens,): values, and what ends them.

    Raises:
        SettingError: ``chat`` and a tokenizer whose template cannot be used.
    """
    draw = random.Random(seed)
    specials = Specials.of(tokenizer)
    start = [] if specials.bos is None else [specials.bos]
    room = n_tokens - ask_tokens - len(start)
    told: list[Fact] = []
    sentences: list[list[int]] = []
    for fact in facts:
        sentence = continuation(tokenizer, ".", f" {fact.told}{fact.value}{fact.after}")
        if sum(map(len, sentences)) + len(sentence) > room:
            break
        told.append(fact)
        sentences.append(sentence)
    ids = start + _between(sentences, text, room - sum(map(len, sentences)), draw)
    targets = [False] * len(ids)
    order = draw.sample(told, len(told))
    if chat:
        pairs = [pair for pair in map(question_of, order) if pair is not None]
        said, counted = dialogue(pairs, tokenizer, n_tokens - len(ids), "chat")
        ids += said
        targets += counted
    for fact in () if chat else order:
        separator = draw.choice(_SEPARATORS)
        question = continuation(tokenizer, ".", separator + (fact.asked if draw.random() < other else fact.told))
        answer = continuation(tokenizer, "is", fact.value + fact.after[:1])
        if len(ids) + len(question) + len(answer) > n_tokens:
            break
        ids += question + answer
        targets += [False] * len(question) + [True] * len(answer)
    rest = n_tokens - len(ids)
    ids += text.stretch(rest, draw)
    targets += [False] * rest
    return np.asarray(ids, np.int32), np.asarray(targets, np.bool_)


def _between(sentences: Sequence[list[int]], text: RealText, room: int, draw: random.Random) -> list[int]:
    """Sentences in their order, with ``room`` tokens of text in stretches of unequal length around them."""
    cuts = sorted(draw.randint(0, room) for _ in sentences)
    ids: list[int] = []
    before = 0
    for cut, sentence in zip(cuts, sentences, strict=True):
        ids += text.stretch(cut - before, draw) + sentence
        before = cut
    return ids + text.stretch(room - before, draw)


def recall_document(
    text: RealText, tokenizer: Any, n_tokens: int, ask_tokens: int, quote_tokens: int, seed: int, whole: float = 0.0
) -> tuple[Ids, Mask]:
    """Real text; the second half of its last ``ask_tokens`` quotes passages from before these.

    Args:
        text: What is read.
        tokenizer: Gives the start token.
        n_tokens: Tokens of the document.
        ask_tokens: Of these, tokens at the end: half go on with the text, half quote.
        quote_tokens: Tokens of a quotation, its first eight among them.
        seed: Of the draw.
        whole: Share of the documents whose earlier windows count too.

    Returns:
        Ids int32 (n_tokens,), and which of them the loss counts, bool (n_tokens,): the last ``ask_tokens`` but for the
        very first and the first tokens of quotations.
    """
    draw = random.Random(seed)
    specials = Specials.of(tokenizer)
    start = [] if specials.bos is None else [specials.bos]
    quotes = max(1, ask_tokens // 2 // quote_tokens)
    plain = n_tokens - quotes * quote_tokens
    ids = start + text.stretch(plain - len(start), draw)
    # Not the first of these: the window before would predict it, and be read for it alone.
    first = 0 if draw.random() < whole else n_tokens - ask_tokens
    targets = [place > first for place in range(plain)]
    for _ in range(quotes):
        place = draw.randrange(len(start), n_tokens - ask_tokens - quote_tokens)
        ids += ids[place : place + quote_tokens]
        targets += [False] * CUE_TOKENS + [True] * (quote_tokens - CUE_TOKENS)
    return np.asarray(ids, np.int32), np.asarray(targets, np.bool_)


class _InRealText(MadeSource[SettingsT]):
    """Made documents of real text."""

    def __init__(self, settings: SettingsT, encoder: TextEncoder, seed: int, paths: list[str] | None) -> None:
        super().__init__(settings, encoder.tokenizer, seed)
        self.text = RealText(paths, encoder, f"{settings.setting}.paths", 2 * settings.tokens)

    @property
    def mark(self) -> object:
        """Its settings, and how much text there is."""
        return repr(self._settings), self._seed, len(self.text.ids)


class FactsSource(_InRealText[FactsSettings]):
    """Documents of facts; see :func:`facts_document`.

    Args:
        settings: What they are like.
        encoder: Text to ids.
        seed: The data module's.

    Raises:
        SettingError: There is too little text.
    """

    def __init__(self, settings: FactsSettings, encoder: TextEncoder, seed: int) -> None:
        if settings.chat:
            dialogue([], encoder.tokenizer, 0, f"{settings.setting}.chat")  # a tokenizer without a template is told now
        super().__init__(settings, encoder, seed, settings.paths)
        self._group: tuple[tuple[bool, int], list[list[Fact]]] | None = None

    def _facts(self, index: int, heldout: bool) -> list[Fact]:
        """Of document ``index``: those beside it have facts of the same relations."""
        settings = self._settings
        group = index // settings.together
        if self._group is None or self._group[0] != (heldout, group):
            # The first documents of a growing curriculum have few facts.
            done = min(1.0, group * settings.together / settings.grow_documents)
            low, high = settings.facts_range
            count = round(low + (high - low) * done)
            draw = random.Random(self._draw(int(heldout), group, 1))
            relations = draw.randint(*settings.relations_range)
            drawn = draw_facts(settings.together, high if heldout else count, relations, draw.getrandbits(48))
            self._group = (heldout, group), drawn
        return self._group[1][index % settings.together]

    def _make(self, index: int, heldout: bool) -> tuple[Ids, Mask]:
        settings = self._settings
        return facts_document(
            self._facts(index, heldout),
            self.text,
            self._tokenizer,
            settings.tokens,
            settings.ask_tokens,
            settings.other_words,
            self._draw(int(heldout), index, 2),
            random.Random(self._draw(int(heldout), index, 3)).random() < settings.chat,
        )


class RecallSource(_InRealText[RecallSettings]):
    """Documents of text that is quoted again; see :func:`recall_document`.

    Args:
        settings: What they are like.
        encoder: Text to ids.
        seed: The data module's.

    Raises:
        SettingError: There is too little text.
    """

    def __init__(self, settings: RecallSettings, encoder: TextEncoder, seed: int) -> None:
        super().__init__(settings, encoder, seed, settings.paths)

    def _make(self, index: int, heldout: bool) -> tuple[Ids, Mask]:
        settings = self._settings
        return recall_document(
            self.text,
            self._tokenizer,
            settings.tokens,
            settings.ask_tokens,
            settings.quote_tokens,
            self._draw(int(heldout), index),
            settings.whole,
        )
