"""Reading a text as a whole, without a memory: the readings that the memory is compared with.

``full_context``: all of it in one window of the backbone, every layer with full attention; read in chunks beside
transformers' KV cache, so that activations stay bounded. ``previous_window``: in local windows of which each keeps the
keys and values of ``overlap`` tokens before it, in every layer (Transformer-XL, arXiv 1901.02860). ``dilated``: memory
layers by the patterns of the settings (LongNet, arXiv 2307.02486), the others in local windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_fot.model.backbone.stretch import at_length
from lightning_fot.model.passes.local_window import MemoryCache
from lightning_fot.model.reading.dilated import read_dilated
from lightning_fot.model.reading.generation import forward_cached

if TYPE_CHECKING:
    from lightning_fot.model.lm import MemoryLM

# Tokens read at once.
CHUNK = 512


@torch.no_grad()
def read_whole(
    lm: MemoryLM, ids: Tensor, keep: int, reading: str, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[Tensor]:
    """Reads a text, and yields the logits of its end as they come.

    Args:
        lm: The attached model; its memory layers, if it has any, see no memory.
        ids: (T,) int64.
        keep: Tokens at the end whose logits are wanted.
        reading: ``full_context``, ``previous_window`` or ``dilated``; the last two follow the model's settings.
        advance: Called with the number of tokens read.

    Yields:
        (n, V) logits of the next tokens of the end, ``keep`` in all.
    """
    if reading == "full_context":
        parts = _one_window(lm, ids, keep)
    else:
        # The last window is full, as that of a text read without its context is.
        parts = (
            read_dilated(lm.attachment, ids[None], keep, True)
            if reading == "dilated"
            else _local_windows(lm, ids, keep)
        )
    for tokens, logits in parts:
        advance(tokens)
        if logits is not None:
            yield logits[0]


def _one_window(lm: MemoryLM, ids: Tensor, keep: int) -> Iterator[tuple[int, Tensor | None]]:
    lm.attachment.check_attached()
    length = len(ids)
    cache = DynamicCache(config=lm.model.config)
    rectified = lm.attachment.rectified(length)
    with at_length(lm.model, length):
        for start in range(0, length, CHUNK):
            part = ids[None, start : start + CHUNK]
            stop = start + part.shape[1]
            # Outside of any pass the model is the plain backbone.
            with nullcontext() if rectified is None else lm.attachment.during(rectified):
                logits = forward_cached(lm.model, part, cache, stop - max(start, length - keep))
            yield part.shape[1], logits


def _local_windows(lm: MemoryLM, ids: Tensor, keep: int) -> Iterator[tuple[int, Tensor | None]]:
    length = len(ids)
    cache = MemoryCache(lm.new_memory(1), lm.config, len(lm.attachment.attentions))
    while cache.seen < length:
        start, stop = cache.seen, min(length, cache.seen + cache.room)
        yield stop - start, forward_cached(lm.model, ids[None, start:stop], cache, stop - max(start, length - keep))
