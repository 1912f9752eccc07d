"""Reads input of any length window by window: each attends to the memory, then is added to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fot.memory.memory import Memory
from lightning_fot.memory.token_log import TokensRead
from lightning_fot.model.passes.window import WindowPass
from lightning_fot.model.reading.generation import check_progress, forward_cached

if TYPE_CHECKING:
    from lightning_fot.model.backbone.attachment import Attachment


def read_windows(
    attached: Attachment,
    ids: Tensor,
    memory: Memory,
    lengths: Tensor,
    ragged: bool,
    keep_from: int,
    report: Callable[[int], None] = lambda tokens: None,
    names: Sequence[str | None] | None = None,
) -> Iterator[Tensor]:
    """Reads rows into a memory, as the settings have it: window by window, or as the way of attending does.

    Args:
        attached: The model with its memory layers.
        ids: (B, T) int64, each row's tokens first.
        memory: Extended in place.
        lengths: (B,) tokens of each row.
        ragged: Whether they differ.
        keep_from: Logits are wanted of the tokens from this place on; with T of none, and nothing above the last
            memory layer is computed.
        report: Told the tokens of each window.
        names: Documents that the rows belong to, where they have any.

    Yields:
        Logits (B, n, vocabulary) of the next tokens that are wanted.
    """
    length = ids.shape[1]
    texts = attached.way.read_texts(attached, ids, length - keep_from)
    if texts is not None:
        for read, logits in texts:
            if logits is not None:
                yield logits
            report(len(ids) * read)
        return
    if attached.config.overlap or attached.config.sink_tokens:
        cache = attached.new_cache(memory, attached.config, attached.recorder)
        cache.ends, cache.names = lengths, names
        if keep_from >= length and attached.memory_layers:
            cache.stop_layer = attached.memory_layers[-1]
        while cache.seen < length:
            start, stop = cache.seen, min(length, cache.seen + cache.room)
            logits = forward_cached(attached.model, ids[:, start:stop], cache, stop - max(start, keep_from))
            check_progress(cache, stop)
            if logits is not None:
                yield logits
            report(ids[:, start:stop].numel())
        cache.finish()
        return
    for start in range(0, length, attached.config.window):
        part = ids[:, start : start + attached.config.window]
        counts = (lengths - start).clamp(0, part.shape[1]) if ragged else None
        wanted = min(part.shape[1], start + part.shape[1] - keep_from)
        logits = _read_window(attached, part, memory, counts, max(0, wanted), names)
        if logits is not None:
            yield logits
        report(part.numel())


def _read_window(
    attached: Attachment,
    ids: Tensor,
    memory: Memory,
    counts: Tensor | None,
    logits_to_keep: int,
    names: Sequence[str | None] | None,
) -> Tensor | None:
    """One window beside the memory, then into it. Logits (B, logits_to_keep, V); None for 0."""
    if not attached.memory_layers and logits_to_keep == 0:
        return None
    stop = attached.memory_layers[-1] if logits_to_keep == 0 else None
    places = torch.arange(ids.shape[1])
    valid = places < (torch.full((len(ids),), ids.shape[1]) if counts is None else counts.cpu())[:, None]
    current = WindowPass(
        memory,
        attached.config.top_k,
        attached.config.dense_pairs,
        stop,
        attached.recorder,
        None if counts is None else valid,
    )
    logits: Tensor | None = None
    with attached.during(attached.window_pass(ids.shape[1]) or current):
        logits = attached.model(input_ids=ids, use_cache=False, logits_to_keep=logits_to_keep).logits
    skip = min(attached.config.skip_window_start, ids.shape[1])
    pairs = {layer: (keys[:, :, skip:], values[:, :, skip:]) for layer, (keys, values) in current.pairs.items()}
    stored = None if counts is None else (counts - skip).clamp_min(0)
    memory.append(pairs, stored, TokensRead(ids, valid, valid & (places >= skip), names))
    return logits
