"""Aggregation: which word of a long list occurs most often (after the common words of RULER, arXiv 2404.06654).

No single place of the text has the answer. A query that finds its k nearest keys sees at most k occurrences in all, so
that counts above k cannot be told apart: top-k memory is known to be weak here.
"""

from __future__ import annotations

import random

from lightning_fot.config.tasks import CommonWordsTask
from lightning_fot.evaluation.tasks.parts.episode import Episode
from lightning_fot.evaluation.tasks.parts.samples import Samples
from lightning_fot.evaluation.tasks.parts.text import as_ids, fill

WORDS = (
    "apple", "bread", "chair", "cloud", "dance", "field", "glass", "heart", "house", "light", "money", "music", "night",
    "ocean", "paper", "plant", "river", "stone", "table", "water",
)  # fmt: skip
_TASK = "Below is a list of words. Memorize how often each occurs. List:"
_QUESTION = "\nQuestion: Which word occurs most often in the list?\nAnswer: The most common word is"


class CommonWords(Samples[CommonWordsTask]):
    """Lists in which one of ``words`` words occurs ``often`` times as often as each other.

    Args:
        settings: What they are like.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        SettingError: A length is too short for every word to occur.
    """

    def _episode(self, length: int, sample: int) -> Episode:
        settings = self._settings
        draw = random.Random(f"{settings.seed}/{sample}")
        words = draw.sample(WORDS, settings.words)
        encoded = {word: self._pieces.encode(f" {word}") for word in words}
        head = [*self._pieces.start, *self._pieces.encode(_TASK, "")]
        # Rounds of the same count, so that the counts hold for any length.
        once = [words[0]] * settings.often + words[1:]
        rounds = (length - len(head)) // sum(len(encoded[word]) for word in once)
        if rounds < 1:
            least = len(head) + sum(len(encoded[word]) for word in once)
            raise settings.error("tokens", f"{length} is too short for the words once, {least}", "Raise it.")
        listed = once * rounds
        draw.shuffle(listed)
        ids, _ = fill([encoded[word] for word in listed], length)
        choices = [f" {word}." for word in words]
        return Episode(as_ids([*head, *ids]), (self._pieces.question(_QUESTION, f" {words[0]}.", choices),))
