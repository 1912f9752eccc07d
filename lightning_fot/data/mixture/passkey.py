"""The passkey task: find a number in a long irrelevant text (Mohtashami & Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_fot.config.sources import PasskeySettings
from lightning_fot.data.mixture.base import MadeSource
from lightning_fot.data.rows.sequences import Mask
from lightning_fot.data.text.token_cache import Ids
from lightning_fot.errors import SettingError

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there."
)
FILLER = (
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


def passkey_prompt(
    tokenizer: Any, n_tokens: int, seed: int, setting: str = "evaluation.passkey_tokens"
) -> PasskeyExample:
    """A prompt of exactly ``n_tokens`` tokens; number and place are drawn uniformly with ``seed``.

    The filler's sentences are whole but for the first after the number, which is cut to make the length exact. Up to
    the number all prompts are alike, so that an evaluation can read what they share once. A start token is put first
    when the tokenizer does that by itself.

    Args:
        tokenizer: A Hugging Face tokenizer.
        n_tokens: Tokens of the prompt.
        seed: Of the draw.
        setting: What set the length, for the error.

    Raises:
        SettingError: The prompt does not fit without any filler.
    """
    number, place = _drawn(seed)
    start = start_ids(tokenizer) + _encode(tokenizer, _TASK)
    needle = continuation(tokenizer, ".", _NEEDLE.format(number=number))
    question = continuation(tokenizer, ".", _QUESTION)
    answer = _answer(tokenizer, number)
    room = n_tokens - len(start) - len(needle) - len(question)
    if room < 0:
        raise SettingError(
            setting,
            n_tokens,
            f"the passkey prompt takes {n_tokens - room} tokens without any filler",
            f"Use {_rounded_up(n_tokens - room)} or more.",
        )
    sentences = [continuation(tokenizer, ".", sentence) for sentence in FILLER]
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


def passkey_document(
    tokenizer: Any, n_tokens: int, seed: int, answer_only: bool = True, setting: str = "tokens"
) -> tuple[Ids, Mask]:
    """A prompt with its answer, as training reads it: start token, prompt, number, end token.

    Args:
        tokenizer: A Hugging Face tokenizer.
        n_tokens: Tokens of the document.
        seed: Of the draw, as for :func:`passkey_prompt`.
        answer_only: Whether the loss counts the number and the end token alone.
        setting: What set the length, for the error.

    Returns:
        Ids int32 (n_tokens,), and which of them the loss counts, bool (n_tokens,).

    Raises:
        SettingError: The document does not fit without any filler.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    answer = _answer(tokenizer, _drawn(seed)[0])
    before = [bos] if bos is not None and not start_ids(tokenizer) else []
    after = answer if eos is None else [*answer, eos]
    prompt = passkey_prompt(tokenizer, n_tokens - len(before) - len(after), seed, setting).prompt_ids
    ids = np.asarray([*before, *prompt, *after], np.int32)
    targets = np.ones(n_tokens, np.bool_)
    if answer_only:
        targets[: n_tokens - len(after)] = False
    return ids, targets


class PasskeySource(MadeSource[PasskeySettings]):
    """Passkey documents without end; document i is a function of the seeds and i.

    Args:
        settings: What they are like.
        tokenizer: A Hugging Face tokenizer.
        seed: The data module's.

    Raises:
        SettingError: ``tokens`` is too few for a document without any filler.
    """

    def __init__(self, settings: PasskeySettings, tokenizer: Any, seed: int) -> None:
        super().__init__(settings, tokenizer, seed)
        for document in self.heldout():
            document.read(0, 1)  # numbers of up to five digits: too few tokens are found now

    def _make(self, index: int, heldout: bool) -> tuple[Ids, Mask]:
        settings = self._settings
        draw = self._draw(int(heldout), index)
        return passkey_document(
            self._tokenizer, settings.tokens, draw, settings.answer_only, f"{settings.setting}.tokens"
        )


def _drawn(seed: int) -> tuple[int, float]:
    """The number, and its place in the filler."""
    draw = random.Random(seed)
    return draw.randint(1, LARGEST_NUMBER), draw.random()


def _answer(tokenizer: Any, number: int) -> list[int]:
    return continuation(tokenizer, _QUESTION.strip(), f" {number}")


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def continuation(tokenizer: Any, context: str, text: str) -> list[int]:
    """Ids of ``text`` as they come after ``context``: tokenizers may mark the start of a text otherwise."""
    head, whole = _encode(tokenizer, context), _encode(tokenizer, context + text)
    return whole[len(head) :] if whole[: len(head)] == head else _encode(tokenizer, text)


def start_ids(tokenizer: Any) -> list[int]:
    """The start token, if the tokenizer puts one before a text by itself."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _rounded_up(tokens: int) -> int:
    return -(-tokens // 64) * 64
