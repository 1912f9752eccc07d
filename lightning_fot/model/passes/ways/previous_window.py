"""Transformer-XL (arXiv 1901.02860): in every layer each window also sees the one before it, without a gradient to it.

With window W and overlap O of the settings a text is cut in segments of S = W - O tokens. The queries of a segment
attend to its own keys, causally, and to the O keys before it; O is S, or a multiple of it. Local position W - 1 is that
of a segment's last token, O that of its first: distances are the true ones, none is larger than W - 1, and rotary
scores depend on nothing else. This is what the reading ``previous_window`` of ``whole_text`` computes
token by token; here all segments of a text go through the model at once.

N texts of n segments each are R = N·n rows; G KV heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot.config.attending.previous_window import Settings
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.rotary import rotate
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.attention.whole import causal_mask
from lightning_fot.model.passes.base import LayerCall, Pass
from lightning_fot.model.passes.way import Attached, WayOfAttending, register

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig


class PreviousWindowPass(Pass):
    """Every layer attends to its own segment and, in the same softmax, to those before that reach into the window.

    Args:
        segments: n, of each text; rows of a text follow each other.
        segment: S, tokens of a segment.
        window: W, a multiple of S.
        differentiable: Let gradients reach keys and values of earlier segments; False detaches them.
        device: Of the model.
    """

    serves_all_layers: ClassVar[bool] = True
    unrotated: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def __init__(self, segments: int, segment: int, window: int, differentiable: bool, device: torch.device) -> None:
        self.segments, self.segment, self.window = segments, segment, window
        self.differentiable = differentiable
        self.positions = self._columns = torch.arange(window, device=device)[None]
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of any layer over the window that ends with each row (R, ...)."""
        key, value = self._windows(key), self._windows(value)
        if call.rotary is not None and call.position_embeddings is not None:
            query, key = rotate(call.rotary, query, key, call.position_embeddings)
        mask = self._mask(len(query) // self.segments, call.sliding_window)
        return attend(
            query, key, value, scale=scale, mask=mask, softcap=softcap, dropout=call.dropout, sinks=call.sinks
        )

    def _windows(self, own: Tensor) -> Tensor:
        """(R, G, S, D) → (R, G, W, D): what comes before each row, then the row; zeros where a text has not begun."""
        rows = own.reshape(-1, self.segments, *own.shape[1:])
        earlier = rows if self.differentiable else rows.detach()
        parts = [
            F.pad(earlier[:, : max(0, self.segments - back)], (0, 0) * 3 + (min(back, self.segments), 0))
            for back in range(self.window // self.segment - 1, 0, -1)
        ]
        return torch.cat([*parts, rows], dim=3).flatten(0, 1)

    def _mask(self, texts: int, sliding: int | None) -> Tensor:
        """(R, 1, S, W) bool: columns that each query sees."""
        if (texts, sliding) not in self._masks:
            device = self._columns.device
            seen = causal_mask(self.segment, self.window, device)
            if sliding is not None:
                seen = seen & ~causal_mask(self.segment, self.window, device).tril(self.window - self.segment - sliding)
            begun = torch.arange(self.segments, device=device)[:, None] * self.segment + self.segment
            there = self._columns >= self.window - begun
            self._masks[texts, sliding] = (seen & there[:, None]).repeat(texts, 1, 1)[:, None]
        return self._masks[texts, sliding]


@register
class PreviousWindowWay(WayOfAttending):
    """Training on whole texts; to read them needs nothing more than local windows that share tokens."""

    settings_type = Settings
    trains_texts = True

    def batch_logits(self, attached: Attached, input_ids: Tensor, crossbatch: CrossbatchConfig) -> Tensor:
        """Each pack is a text."""
        texts = input_ids.reshape(len(input_ids) // crossbatch.rows_of_a_text, -1)
        return previous_window_logits(attached, texts, crossbatch.differentiable).reshape(*input_ids.shape, -1)


def previous_window_logits(attached: Attached, input_ids: Tensor, differentiable: bool = False) -> Tensor:
    """Logits of whole texts in which every layer sees the window before, with gradients.

    Args:
        attached: The attached model, without memory layers; window and overlap are those of its settings.
        input_ids: (N, T) int64, T a multiple of window - overlap. The first segment of a text has none before it.
        differentiable: Let gradients reach keys and values of earlier segments. The paper's models do not.

    Returns:
        (N, T, vocabulary).

    Raises:
        SettingError: Settings or ids do not fit.
    """
    Settings().check(attached.config)
    window, segment = attached.config.window, attached.config.window - attached.config.overlap
    texts, length = input_ids.shape
    if length % segment:
        raise SettingError("input_ids", (texts, length), f"are no whole segments of {segment}", "Give whole ones.")
    current = PreviousWindowPass(length // segment, segment, window, differentiable, attached.device)
    with attached.during(current):
        logits: Tensor = attached.model(input_ids=input_ids.reshape(-1, segment), use_cache=False).logits
    return logits.reshape(texts, length, -1)
