"""The passkey task: find a number in a long irrelevant text (Mohtashami & Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from lightning_fot.errors import SettingError

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there."
)
_FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
_NEEDLE = " The pass key is {number}. Remember it. {number} is the pass key."
_QUESTION = " What is the pass key? The pass key is"
LARGEST_NUMBER = 50_000


@dataclass(frozen=True)
class PasskeyExample:
    """One prompt and what must follow it.

    Args:
        prompt_ids: Token ids of exactly the length asked for.
        answer_ids: Token ids of the number, as they continue the prompt.
        depth: Where the number stands in the filler: 0 at its start, 1 at its end.
        number: The pass key.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    depth: float
    number: int


def passkey_prompt(tokenizer: Any, n_tokens: int, seed: int) -> PasskeyExample:
    """A prompt of exactly ``n_tokens`` tokens; number and place are drawn uniformly with ``seed``.

    The filler's sentences are whole but for the first after the number, which is cut to make the length exact. Up to
    the number all prompts are alike, so that an evaluation can read what they share once. A start token is put first
    when the tokenizer does that by itself.

    Args:
        tokenizer: A Hugging Face tokenizer.
        n_tokens: Tokens of the prompt.
        seed: Of the draw.

    Raises:
        SettingError: The prompt does not fit without any filler.
    """
    draw = random.Random(seed)
    number = draw.randint(1, LARGEST_NUMBER)
    place = draw.random()
    start = _start(tokenizer) + _encode(tokenizer, _TASK)
    needle = _continuation(tokenizer, ".", _NEEDLE.format(number=number))
    question = _continuation(tokenizer, ".", _QUESTION)
    answer = _continuation(tokenizer, _QUESTION.strip(), f" {number}")
    room = n_tokens - len(start) - len(needle) - len(question)
    if room < 0:
        raise SettingError(
            "evaluation.passkey_tokens",
            n_tokens,
            f"the passkey prompt takes {n_tokens - room} tokens without any filler",
            f"Use {_rounded_up(n_tokens - room)} or more.",
        )
    sentences = [_continuation(tokenizer, ".", sentence) for sentence in _FILLER]
    before: list[int] = []
    for sentence in itertools.cycle(sentences):
        if len(before) + len(sentence) > place * room:
            break
        before += sentence
    after_length = room - len(before)
    cycle = list(itertools.chain(*sentences))
    repeats = -(-after_length // len(cycle))
    after = (cycle * repeats)[len(cycle) * repeats - after_length :]
    depth = len(before) / room if room else 0.0
    return PasskeyExample(start + before + needle + after + question, answer, depth, number)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _continuation(tokenizer: Any, context: str, text: str) -> list[int]:
    """Ids of ``text`` as they come after ``context``: tokenizers may mark the start of a text otherwise."""
    head, whole = _encode(tokenizer, context), _encode(tokenizer, context + text)
    return whole[len(head) :] if whole[: len(head)] == head else _encode(tokenizer, text)


def _start(tokenizer: Any) -> list[int]:
    """The start token, if the tokenizer puts one before a text by itself."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _rounded_up(tokens: int) -> int:
    return -(-tokens // 64) * 64
