"""Dilated attention on the memory layers (LongNet, arXiv 2307.02486): training on whole texts, and reading them.

Other layers attend within their window alone, as always. Memory layers attend over the whole text by the patterns of
the settings; their positions are places in the text, in the backbone's own rotary, and as a pattern reaches no further
than its segment, no distance is larger than the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_fot.config.attending.base import SETTING
from lightning_fot.config.attending.dilated import Settings
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.dilated import Patterns, dilated_attention, first_needed
from lightning_fot.model.passes.base import LayerCall, Pairs, Pass, StopForward
from lightning_fot.model.passes.way import Attached, WayOfAttending, register

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig


class DilatedPass(Pass):
    """Memory layers attend over their text; the rows of a call are its windows.

    Args:
        patterns: Segment lengths and dilations.
        window: T, tokens of a row.
        windows: n, rows of a text, which follow each other.
        texts: N.
        device: Of the model.
        start: Place of the first token in its text.
        earlier: By layer, keys and values (N, G, e, D) of the e places before ``start``, of reading; None in training.
        stop_layer: Memory layer above which nothing is needed; None computes the whole forward.
    """

    replayable: ClassVar[bool] = True

    def __init__(
        self,
        patterns: Patterns,
        window: int,
        windows: int,
        texts: int,
        device: torch.device,
        start: int = 0,
        earlier: Pairs | None = None,
        stop_layer: int | None = None,
    ) -> None:
        self.patterns, self.windows, self.start, self.earlier = patterns, windows, start, earlier
        self.stop_layer = stop_layer
        self.stop = start + windows * window
        self.positions = torch.arange(start, self.stop, device=device).reshape(windows, window).repeat(texts, 1)
        self.pairs: Pairs = {}
        """Of reading: by layer, keys and values of ``earlier`` and of the call's tokens."""

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of a memory layer over the whole text (B, ...)."""
        self._check(call, softcap)
        query, key, _ = call.local(query, key)
        query, key, value = (self._as_texts(tensor) for tensor in (query, key, value))
        if self.earlier is not None:
            before = self.earlier.get(call.layer_idx, (key[:, :, :0], value[:, :, :0]))
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
            self.pairs[call.layer_idx] = (key, value)
        if call.layer_idx == self.stop_layer:
            raise StopForward
        found = dilated_attention(query, key, value, self.patterns, scale=scale, stop=self.stop)
        return self._as_rows(found)

    def _as_texts(self, rows: Tensor) -> Tensor:
        """(N·n, H, T, D) → (N, H, n·T, D)."""
        return rows.reshape(-1, self.windows, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)

    def _as_rows(self, texts: Tensor) -> Tensor:
        """(N, H, n·T, D) → (N·n, H, T, D)."""
        cut = texts.reshape(*texts.shape[:2], self.windows, -1, texts.shape[3])
        return cut.transpose(1, 2).flatten(0, 1)

    def _check(self, call: LayerCall, softcap: float | None) -> None:
        """Refuses what fused kernels cannot do, and layers that see less than the patterns would show them."""
        longest = max(size for size, _ in self.patterns)
        if softcap is not None:
            problem = "has soft-capped scores, which dilated attention does not"
        elif call.sinks is not None:
            problem = "has attention sinks, which dilated attention does not"
        elif call.dropout:
            problem = f"drops {call.dropout:g} of its attention weights, which dilated attention does not"
        elif call.sliding_window is not None and call.sliding_window < longest:
            problem = f"sees {call.sliding_window} tokens back and no further"
        else:
            return
        raise SettingError(
            f"{SETTING}.segments",
            [size for size, _ in self.patterns],
            f"layer {call.layer_idx} of this backbone {problem}",
            "Use a backbone of plain full attention without dropout of attention weights.",
        )


@register
class DilatedWay(WayOfAttending):
    """Whole texts, in training as in reading; nothing is stored in a memory."""

    settings_type = Settings
    fixed_frequencies = True
    trains_texts = True
    settings: Settings

    def plain_passes(self, tokens: int, device: torch.device) -> list[Pass]:
        """One segment without a gap is plain attention."""
        return [DilatedPass([(max(self.settings.segments), 1)], tokens, 1, 1, device)]

    def read_texts(
        self, attached: Attached, input_ids: Tensor, keep: int, ends_full: bool = False
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Window by window; memory layers keep keys and values of their longest segment in progress."""
        patterns = self.settings.patterns
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

    def batch_logits(self, attached: Attached, input_ids: Tensor, crossbatch: CrossbatchConfig) -> Tensor:
        """Each pack is a text."""
        texts = input_ids.reshape(len(input_ids) // crossbatch.rows_of_a_text, -1)
        return dilated_logits(attached, texts, self.settings.patterns).reshape(*input_ids.shape, -1)


def dilated_logits(attached: Attached, input_ids: Tensor, patterns: Patterns) -> Tensor:
    """Logits of whole texts, with gradients.

    Args:
        attached: The attached model; the window is that of its settings.
        input_ids: (N, T) int64, T a multiple of the window.
        patterns: Segment lengths and dilations.

    Returns:
        (N, T, vocabulary).

    Raises:
        SettingError: Ids do not fit.
    """
    texts, length = input_ids.shape
    window = attached.config.window
    if length % window:
        raise SettingError("input_ids", (texts, length), f"are no whole windows of {window}", "Give whole ones.")
    current = DilatedPass(patterns, window, length // window, texts, attached.device)
    with attached.during(current):
        logits: Tensor = attached.model(input_ids=input_ids.reshape(-1, window), use_cache=False).logits
    return logits.reshape(texts, length, -1)
