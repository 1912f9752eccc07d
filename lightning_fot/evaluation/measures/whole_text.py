"""Reading a text as a whole, without a memory: the readings that the memory is compared with.

``full_context``: all of it in one window of the backbone, every layer with full attention; read in chunks beside
transformers' KV cache, so that activations stay bounded. All others are names of ways of attending: see
``model/passes/ways``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_fot.model.backbone.layers import text_config
from lightning_fot.model.backbone.stretch import at_length
from lightning_fot.model.passes.way import reading_way
from lightning_fot.model.reading.generation import forward_cached
from lightning_fot.model.reading.windows import read_windows

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
        reading: ``full_context``, or the name of a way of attending, by the model's settings.
        advance: Called with the number of tokens read.

    Yields:
        (n, V) logits of the next tokens of the end, ``keep`` in all.
    """
    if reading == "full_context":
        yield from _one_window(lm, ids, keep, advance)
        return
    way = reading_way(lm.attachment.way, reading)
    # The last window is full, as that of a text read without its context is.
    texts = way.read_texts(lm.attachment, ids[None], keep, ends_full=True)
    if texts is None:
        length = torch.tensor([len(ids)])
        for logits in read_windows(lm.attachment, ids[None], lm.new_memory(1), length, False, len(ids) - keep, advance):
            yield logits[0]
        return
    for tokens, found in texts:
        advance(tokens)
        if found is not None:
            yield found[0]


def positions_left(lm: MemoryLM, tokens: int) -> int:
    """How many tokens a backbone can read in its own context behind so many; 0 or less where it cannot."""
    if lm.memory_layers and lm.config.positions == "none":
        # It was trained without the positions that it would need.
        return 0
    return int(text_config(lm.model).max_position_embeddings) - tokens


class FullContext:
    """A text read once into one window of the backbone, and what is read behind it, which leaves it as it was.

    Args:
        lm: The attached model; its memory layers, if it has any, see no memory.
        ids: (T,) int64.
        room: Tokens that are read behind it, at most.
        advance: Called with the number of tokens read.
    """

    def __init__(self, lm: MemoryLM, ids: Tensor, room: int, advance: Callable[[int], None]) -> None:
        self._lm = lm
        self._length = len(ids) + room
        self._cache = DynamicCache(config=lm.model.config)
        for _ in _behind(lm, ids, self._cache, self._length, 0, advance):
            pass

    def logits(self, ids: Tensor, keep: int) -> Tensor:
        """(keep, V) logits of the next tokens of the end of ids (n,), read behind the text."""
        found = _behind(self._lm, ids, copy.deepcopy(self._cache), self._length, keep, lambda tokens: None)
        return torch.cat(list(found))


def _one_window(lm: MemoryLM, ids: Tensor, keep: int, advance: Callable[[int], None]) -> Iterator[Tensor]:
    yield from _behind(lm, ids, DynamicCache(config=lm.model.config), len(ids), keep, advance)


@torch.no_grad()
def _behind(
    lm: MemoryLM, ids: Tensor, cache: DynamicCache, length: int, keep: int, advance: Callable[[int], None]
) -> Iterator[Tensor]:
    """Reads ids (T,) behind what a KV cache holds, as a part of a text of ``length``; logits of the last ``keep``."""
    lm.attachment.check_attached()
    tokens = len(ids)
    current = lm.attachment.window_pass(length)
    with at_length(lm.model, length):
        for start in range(0, tokens, CHUNK):
            part = ids[None, start : start + CHUNK]
            stop = start + part.shape[1]
            # Outside of any pass the model is the plain backbone.
            with nullcontext() if current is None else lm.attachment.during(current):
                logits = forward_cached(lm.model, part, cache, stop - max(start, tokens - keep))
            advance(part.shape[1])
            if logits is not None:
                yield logits[0]
