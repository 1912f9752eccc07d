"""What one token takes when a text is written token by token, beside what the machine allows."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.config.retriever import EXACT
from lightning_fot.evaluation.speed.limits import decoding_limit
from lightning_fot.evaluation.speed.split import Stopwatch
from lightning_fot.evaluation.speed.timing import synchronise
from lightning_fot.model.reading.generation import forward_cached, read_cached, while_generating

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

STEPS = 12
# The first ones still allocate.
_WARM = 2


def searched_exactly(memory: Memory) -> Memory:
    """A copy of a memory that searches the same pairs exactly; none of them is copied."""
    copy = memory.snapshot()
    for layer in copy.layers.values():
        layer.use_retriever(EXACT)
    return copy


@torch.no_grad()
def measure_decoding(lm: MemoryLM, memory: Memory | None, ids: Tensor) -> dict[str, Any] | None:
    """Reads a real text token by token, as ``generate`` does, behind a prompt of a quarter of a window.

    The local window does not move meanwhile, so that nothing is stored: a move is one step in half a window.

    Args:
        lm: The model.
        memory: Of one row; it stays as it is. None for no memory.
        ids: (n,) int64, prompt and tokens.

    Returns:
        ``memory_tokens``, ``ms_p50`` of a token, ``splits`` (see ``split_rows``)
        and the fields of ``Limit.beside``; None where a text is too short, or
        the way of attending is not served while generating.
    """
    config = while_generating(lm.config)
    prompt = max(1, config.window // 4)
    steps = min(STEPS + _WARM, len(ids) - prompt, config.window - prompt)
    if steps <= _WARM or not lm.attachment.way.settings.goes_on:
        return None
    held = lm.new_memory(1) if memory is None else memory.snapshot()
    cache = lm.attachment.new_cache(held, config)
    read_cached(lm.model, ids[None, :prompt], torch.tensor([prompt]), cache)
    cache.ends = None
    watch, seconds = Stopwatch(lm.device), []
    for place in range(prompt, prompt + steps):
        if place < prompt + _WARM:
            forward_cached(lm.model, ids[None, place : place + 1], cache, 1)
            continue
        began = time.perf_counter()
        with watch.running(None if memory is None else held):
            logits = forward_cached(lm.model, ids[None, place : place + 1], cache, 1)
            assert logits is not None
            logits.argmax(-1)
        synchronise(lm.device)
        seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds)
    limit = decoding_limit(lm, memory)
    return {
        "memory_tokens": 0 if memory is None else len(memory),
        "ms_p50": 1e3 * middle,
        "splits": {"decoding": {"tokens": len(seconds), **watch.split.as_dict()}},
        **({} if limit is None else limit.beside(middle)),
    }
