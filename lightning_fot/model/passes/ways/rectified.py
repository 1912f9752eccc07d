"""Rectified positions (ReRoPE, https://kexue.fm/archives/9708): distances beyond a limit count as the limit.

    score(i, j) = <R(min(i - j, w)) q_i, k_j>,    R(n) the backbone's rotation by n positions

so that no distance is one that the backbone has not been trained on. A pair is scored in one of two ways: nearer than
``w`` both sides are rotated to their own places; from there on the query is rotated to place ``w`` and the key to
place 0. B rows, H query heads, G KV heads, R = H/G, L queries that are the last of S keys, D head size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_fot.config.attending.base import SETTING
from lightning_fot.config.attending.rectified import Settings
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.rectified import rectified_attention
from lightning_fot.model.attention.rotary import rotate
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.passes.base import LayerCall, Pass
from lightning_fot.model.passes.way import WayOfAttending, register


class RectifiedPass(Pass):
    """Every layer attends with rectified positions; keys of earlier calls may come from a KV cache, not rotated.

    Args:
        length: Tokens of the whole text, those of earlier and later calls included.
        max_distance: From this distance on all are the same.
        device: Of the model.
    """

    serves_all_layers: ClassVar[bool] = True
    unrotated: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def __init__(self, length: int, max_distance: int, device: torch.device) -> None:
        self.max_distance = max_distance
        self.positions = torch.arange(max(length, max_distance + 1), device=device)[None]

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of any layer over all tokens so far."""
        if call.sinks is not None:
            raise SettingError(
                SETTING,
                "rectified",
                f"layer {call.layer_idx} of this backbone has attention sinks, which it does not know",
                "Use a backbone of plain full attention.",
            )
        if call.sliding_window is not None:
            raise SettingError(
                f"{SETTING}.max_distance",
                self.max_distance,
                f"layer {call.layer_idx} of this backbone sees {call.sliding_window} tokens back and no further",
                "Use a backbone of full attention.",
            )
        width = key.shape[2]
        if call.rotary is None or call.position_embeddings is None:
            return attend(query, key, value, scale=scale, softcap=softcap, dropout=call.dropout)
        cos, sin = call.position_embeddings
        local_query, local_key = rotate(call.rotary, query, key, (cos[:, :width], sin[:, :width]))
        if width <= self.max_distance:
            return attend(local_query, local_key, value, scale=scale, softcap=softcap, dropout=call.dropout)
        place = slice(self.max_distance, self.max_distance + 1)
        limit = tuple(part[:, place].expand(-1, query.shape[2], -1) for part in (cos, sin))
        return rectified_attention(
            local_query,
            call.rotary(query, query[:, :1], *limit)[0],
            local_key,
            call.to_position_zero(key),
            value,
            self.max_distance,
            scale=scale,
            softcap=softcap,
            dropout=call.dropout,
        )


@register
class RectifiedWay(WayOfAttending):
    """All layers of a window that is read alone; also of a whole text in one window, the reading ``full_context``."""

    settings_type = Settings
    settings: Settings

    def plain_passes(self, tokens: int, device: torch.device) -> list[Pass]:
        """No distance within the limit changes."""
        return [RectifiedPass(tokens, tokens, device)]

    def window_pass(self, length: int, device: torch.device) -> Pass:
        """Every window has it."""
        return RectifiedPass(length, self.settings.max_distance, device)
