"""What an answer is, wherever it was generated. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttendedPassage:
    """A stretch of a document, ready to be shown.

    Args:
        document: Its name.
        start: Position of its first token in the document.
        stop: Position behind its last token.
        tokens: Tokens of the document.
        share: Its part of all attention that the answer gave to the memory, 0 to 1.
        rank_share: Its part of what passages are ranked by, 0 to 1: see :mod:`lightning_fot.memory.passages`.
        text: What it says.
    """

    document: str
    start: int
    stop: int
    tokens: int
    share: float
    rank_share: float
    text: str


@dataclass(frozen=True)
class Answer:
    """An answer.

    Args:
        question: What was asked.
        text: The answer.
        complete: Whether the model ended it, not the limit of tokens.
        prompt_tokens: Tokens of what was asked: the chat template and the conversation so far included, quotes not.
        answer_tokens: Tokens generated.
        seconds: Time from question to answer.
        seed: Of sampling; None for a greedy answer.
        passages: Best first; None where none were wanted.
    """

    question: str
    text: str
    complete: bool
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    seed: int | None
    passages: list[AttendedPassage] | None
