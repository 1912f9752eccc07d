"""Look-up: facts told once each in real text, asked for in the words they were told in and in other words.

Neighbouring facts share their sentence and differ in the name alone, so that a model which cannot tell them apart gives
one answer to all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_fot.config.tasks import LookupTask
from lightning_fot.evaluation.tasks.parts.episode import Episode, Ids
from lightning_fot.evaluation.tasks.parts.facts import make_facts, sentences_of, text_with
from lightning_fot.evaluation.tasks.parts.text import Pieces, as_ids
from lightning_fot.evaluation.tasks.parts.texts import HeldOut

# In which words is asked; each is an episode of the same text.
WORDS = ("told", "other")


class Lookup:
    """The task: a text of each length, which tells all facts at even depths.

    Args:
        settings: What is told.
        tokenizer: A Hugging Face tokenizer.
        texts: The documents that facts are told in, one after the other.

    Raises:
        SettingError: A length has no room for the facts, or there is too little text for it.
    """

    def __init__(self, settings: LookupTask, tokenizer: Any, texts: Sequence[HeldOut]) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer)
        self._facts = make_facts(settings.facts, settings.seed)
        self._contexts: dict[int, Ids] = {}
        self._sentences = [sentence for text in texts for sentence in sentences_of(_words(tokenizer, text))]
        asked = {
            "told": [f"\n{fact.told}" for fact in self._facts],
            "other": [f"\n{fact.other}" for fact in self._facts],
        }
        answers = [fact.answer for fact in self._facts]
        # As many tokens are said of each, so that one answer to all questions is one text.
        say = max(len(self._pieces.encode(answer, "is")) for answer in answers)
        self._probes = {
            words: tuple(
                self._pieces.question(question, answer, say=say)
                for question, answer in zip(asked[words], answers, strict=True)
            )
            for words in WORDS
        }
        # All are made, so that what cannot be is told now; the longest first.
        for length in reversed(settings.lengths):
            self._context(length)

    def episodes(self, length: int) -> list[Episode]:
        """Two: the same text, asked in told words and in others."""
        return [Episode(self._context(length), self._probes[words], asked=words) for words in WORDS]

    def _context(self, length: int) -> Ids:
        if length not in self._contexts:
            self._contexts[length] = as_ids(self._told(length))
        return self._contexts[length]

    def _told(self, length: int) -> list[int]:
        room = length - len(self._pieces.start)
        facts = sum(self._size(f" {fact.statement}") for fact in self._facts)
        if 2 * facts > room:
            problem = f"{length} is less than twice what {len(self._facts)} facts take, {facts} tokens"
            raise self._settings.error("tokens", problem, "Raise it, or tell fewer facts.")
        while True:
            text, taken = text_with(self._facts, self._sentences, self._size, room, self._settings.seed)
            if taken == len(self._sentences):
                have = sum(map(self._size, (f" {sentence}" for sentence in self._sentences)))
                fix = "Use fewer, name more text in evaluation.lookup.paths, or raise data.heldout_fraction."
                raise self._settings.error("tokens", f"{length} is more than the text has, {have:,} tokens", fix)
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            over = len(ids) + len(self._pieces.start) - length
            if over <= 0:
                return [*self._pieces.start, *ids]
            # A tokenizer for which a text is more than its sentences.
            room -= over

    def _size(self, text: str) -> int:
        return len(self._pieces.encode(text))


def _words(tokenizer: Any, text: HeldOut) -> str:
    return str(tokenizer.decode([int(token) for token in text.ids], clean_up_tokenization_spaces=False))


def as_answer(said: str) -> str:
    """What was said, up to the end of its sentence, clause or line."""
    return re.split(r"[.,;!?\n]", said.strip(" "), maxsplit=1)[0].strip()


def same_answers(said: Sequence[str], right: Sequence[bool]) -> dict[str, Any]:
    """How far a model told its facts apart.

    Args:
        said: What it answered to each question.
        right: Which of these are right.

    Returns:
        ``distinct_wrong``: different wrong answers; ``commonest``: questions that got the commonest answer, right or
        wrong, which is ``commonest_answer``.
    """
    (answer, count), *_ = Counter(said).most_common(1)
    wrong = {one for one, good in zip(said, right, strict=True) if not good}
    return {"distinct_wrong": len(wrong), "commonest": count, "commonest_answer": answer}
