"""Quotes: passages that a question attends to are read once more, right before it, in its own window.

Some pairs draw any question; so what a question that asks for nothing in particular attends to is taken off.

The memory finds; the window reads. Attention to single pairs of a few layers tells a model where something was said
more surely than what: read again, the words around it are there for all layers, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.memory.passages import AttentionTrace, Passage
    from lightning_fot.model.lm import MemoryLM

LENGTH = 64
NEUTRAL = "What is this text about?"
"""Asks for nothing in particular."""


@torch.no_grad()
def find_quotes(
    lm: MemoryLM,
    prompt: Sequence[int],
    memory: Memory,
    count: int,
    length: int = LENGTH,
    neutral: Sequence[int] = (),
) -> list[Passage]:
    """The passages that a prompt attends to most, in the order in which they were read.

    Args:
        lm: The attached model.
        prompt: Ids of the question, as it will be asked.
        memory: One row, what was read; it stays as it is.
        count: Passages wanted.
        length: Tokens of a passage.
        neutral: Ids of :data:`NEUTRAL`, framed as the prompt is; without them, what draws any question counts too.

    Returns:
        At most ``count`` passages: fewer where the prompt attends to less, or the window has no room for more.

    Raises:
        SettingError: ``count`` is below 0 or ``length`` below 1, or the memory has several rows.
    """
    if count < 0:
        raise SettingError("quotes", count, "must be at least 0", "Correct it; 0 quotes nothing.")
    if memory.batch_size != 1:
        raise SettingError("memory", f"{memory.batch_size} rows", "is not one row", "Ask each row by itself.")
    # What leaves the window is in the memory already.
    room = (lm.config.last_context_length or lm.config.window) - len(prompt)
    count = min(count, max(0, room) // (length + 1))
    if not count or not len(memory):
        return []
    trace = _attention(lm, prompt, memory)
    against = _attention(lm, neutral, memory) if neutral else None
    found = trace.passages(memory, length, count, queries="prompt", against=against)
    return sorted(found, key=lambda passage: (passage.document.number, passage.start))


def _attention(lm: MemoryLM, prompt: Sequence[int], memory: Memory) -> AttentionTrace:
    with lm.record_attention() as trace:
        lm(torch.tensor([list(prompt)], device=lm.device), memory=memory, logits_to_keep=1)
    return trace


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
