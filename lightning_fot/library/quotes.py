"""Quotes: passages that a question is about are read once more, right before it, in its own window.

They are those that it attends to, and those that share its rare words. Some pairs draw any question; so what a question
that asks for nothing in particular attends to is taken off.

The memory finds; the window reads. Attention to single pairs of a few layers tells a model where something was said
more surely than what: read again, the words around it are there for all layers, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_fot.errors import SettingError
from lightning_fot.memory.token_log import UNKNOWN_TOKEN

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.memory.passages import AttentionTrace, Passage
    from lightning_fot.memory.windows import AskedWords
    from lightning_fot.model.lm import MemoryLM

LENGTH = 96
# What is found is shorter than what is shown: two quotes that were found by 64 of their 96 tokens held the answer to 55
# of 80 questions, by all 96 to 51, and of the 64 alone to 47 (docs/LOG.md).
_FOUND_BY = (2, 3)
NEUTRAL = "What is this text about?"
"""Asks for nothing in particular."""


@dataclass(frozen=True)
class Quoting:
    """What quotes of a prompt are found by, beside the prompt.

    Args:
        neutral: Ids of :data:`NEUTRAL`, framed as the prompt is; without them, what draws any question counts too.
        words: The question's own words; None goes by attention alone.
    """

    neutral: Sequence[int] = ()
    words: AskedWords | None = None


@torch.no_grad()
def find_quotes(
    lm: MemoryLM,
    prompt: Sequence[int],
    memory: Memory,
    count: int,
    length: int = LENGTH,
    quoting: Quoting = Quoting(),
    between: int = 1,
) -> list[Passage]:
    """The passages that a prompt attends to most or shares its rarest words with, in the order in which they were read.

    Args:
        lm: The attached model.
        prompt: Ids of the question, as it will be asked.
        memory: One row, what was read; it stays as it is.
        count: Passages wanted.
        length: Tokens of a passage: those that it was found by, two thirds, and what stands around them. Where the
            window has less room, there is less around them, down to none.
        quoting: What they are found by, beside the prompt.
        between: Tokens that will stand before each quote and behind the last.

    Returns:
        At most ``count`` passages: fewer where the prompt attends to less, or the window has no room for more. What the
        memory holds without knowing its tokens is never one.

    Raises:
        SettingError: ``count`` or ``between`` is no whole number from 0 or ``length`` none from 1, or the memory has
            several rows.
    """
    for name, value, least in (("quotes", count, 0), ("length", length, 1), ("between", between, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(name, value, f"must be a whole number, at least {least}", "Correct it.")
    if memory.batch_size != 1:
        raise SettingError("memory", f"{memory.batch_size} rows", "is not one row", "Ask each row by itself.")
    # What leaves the window is in the memory already.
    room = (lm.config.last_context_length or lm.config.window) - len(prompt)
    found_by = max(1, length * _FOUND_BY[0] // _FOUND_BY[1])
    count = min(count, max(0, room - between) // (found_by + between))
    if not count or not len(memory):
        return []
    length = min(length, (room - between) // count - between)
    trace = _attention(lm, prompt, memory)
    against = _attention(lm, quoting.neutral, memory) if quoting.neutral else None
    passages = trace.passages(memory, found_by, count, queries="prompt", against=against, words=quoting.words)
    return [one for one in _widened(passages, length, memory) if _is_known(one)]


def _widened(passages: list[Passage], length: int, memory: Memory) -> list[Passage]:
    """Passages with what stands around them, in the order of the text, none reaching into another."""
    ordered = sorted(passages, key=lambda one: (one.document.number, one.start))
    starts = {(one.document.number, one.start) for one in ordered}
    wide: list[Passage] = []
    for one in ordered:
        document = one.document
        before = [other.stop for other in wide if other.document.number == document.number]
        behind = [start for number, start in starts if number == document.number and start > one.start]
        low, high = max([document.first, *before]), min([document.tokens, *behind])
        start = max(low, min(one.start - (length - (one.stop - one.start)) // 2, high - length))
        stop = min(high, start + length)
        wide.append(replace(one, start=start, stop=stop, token_ids=memory.log.tokens(document.number, start, stop)))
    return wide


def _attention(lm: MemoryLM, prompt: Sequence[int], memory: Memory) -> AttentionTrace:
    with lm.record_attention() as trace:
        lm(torch.tensor([list(prompt)], device=lm.device), memory=memory, logits_to_keep=1)
    return trace


def _is_known(passage: Passage) -> bool:
    """Whether all its tokens are known: pairs may be stored without them."""
    return bool((passage.token_ids != UNKNOWN_TOKEN).all())


def with_quotes(prompt: Sequence[int], quotes: Sequence[Passage], between: Sequence[int]) -> list[int]:
    """Ids of a prompt behind its quotes.

    Args:
        prompt: Ids of the question.
        quotes: What :func:`find_quotes` found.
        between: Ids that stand before each quote and behind the last, such as those of a line break.
    """
    ids: list[int] = []
    for quote in quotes:
        ids += [*between, *quote.token_ids.tolist()]
    return [*ids, *between, *prompt] if quotes else list(prompt)
