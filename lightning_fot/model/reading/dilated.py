"""Reads texts window by window with dilated attention in the memory layers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_fot.model.attention.dilated import first_needed
from lightning_fot.model.passes.base import Pairs
from lightning_fot.model.passes.dilated import DilatedPass, patterns_of

if TYPE_CHECKING:
    from lightning_fot.model.backbone.attachment import Attachment


def read_dilated(
    attached: Attachment, input_ids: Tensor, keep: int, ends_full: bool = False
) -> Iterator[tuple[int, Tensor | None]]:
    """Reads texts window by window; memory layers keep keys and values of their longest segment in progress.

    Args:
        attached: The model with its memory layers.
        input_ids: (N, T) int64; what stands at the end of a shorter text changes nothing before it.
        keep: Tokens at the end whose logits are wanted.
        ends_full: Let the first window be the shorter one, where windows do not divide the text, and not the last.

    Yields:
        Tokens of each text read, and logits (N, n, vocabulary) of the next tokens of the end, or None.
    """
    patterns = patterns_of(attached.config)
    earlier: Pairs = {}
    length, window = input_ids.shape[1], attached.config.window
    rest = length % window if ends_full else 0
    starts = [0, *range(rest or window, length, window)]
    for start, stop in pairwise([*starts, length]):
        part = input_ids[:, start:stop]
        wanted = max(0, stop - max(start, length - keep))
        stop_layer = None if wanted else attached.memory_layers[-1]
        current = DilatedPass(patterns, part.shape[1], 1, len(part), attached.device, start, earlier, stop_layer)
        logits: Tensor | None = None
        with attached.during(current):
            logits = attached.model(input_ids=part, use_cache=False, logits_to_keep=wanted).logits
        kept = stop - first_needed(stop, patterns)
        earlier = {
            layer: (keys[:, :, keys.shape[2] - kept :], values[:, :, values.shape[2] - kept :])
            for layer, (keys, values) in current.pairs.items()
        }
        yield part.shape[1], logits
