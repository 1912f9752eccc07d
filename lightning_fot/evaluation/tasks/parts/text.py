"""Pieces of text as token ids, and texts that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_fot.data.mixture.passkey import continuation, start_ids
from lightning_fot.evaluation.tasks.parts.episode import Ids, Probe


class Pieces:
    """Encodes pieces one by one, so that what stands where is known in tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.start = start_ids(tokenizer)
        """The start token, if the tokenizer puts one before a text by itself."""
        self.encode = lru_cache(maxsize=None)(self._encode)

    def _encode(self, text: str, before: str = ".") -> tuple[int, ...]:
        """Ids of a text as they come after another."""
        return tuple(continuation(self._tokenizer, before, text))

    def question(
        self, prompt: str, answer: str, choices: Sequence[str] = (), more: Sequence[int] = (), say: int = 0
    ) -> Probe:
        """A prompt with its answer.

        Args:
            prompt: The question, up to the answer.
            answer: What goes on from there.
            choices: Answers among which it is chosen.
            more: Ids before the prompt.
            say: Of a wrong answer, how many tokens of what is said instead are noted.
        """
        asked = [*more, *self.encode(prompt)]
        ids = self.encode(answer, prompt.strip())
        chosen = tuple(dict.fromkeys(self.encode(choice, prompt.strip()) for choice in choices))
        return Probe(as_ids([*asked, *ids]), ((len(asked), len(asked) + len(ids)),), chosen, say)


def as_ids(tokens: Sequence[int]) -> Ids:
    """int32 (n,)."""
    return np.asarray(tokens, np.int32)


def fill(pieces: Sequence[Sequence[int]], room: int) -> tuple[list[int], int]:
    """As many whole pieces, from the first on, as there is room for: their ids, and how many they are."""
    ids: list[int] = []
    for count, piece in enumerate(pieces):
        if len(ids) + len(piece) > room:
            return ids, count
        ids += piece
    return ids, len(pieces)
