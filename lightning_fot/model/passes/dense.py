"""Reading a whole text beside a memory in one forward, by the backbone's own attention function: what reading must be.

It has no cache, no index and no memory: what each token sees is listed, and the backbone's own function, which knows of
its sinks and soft caps, is given those keys. The self-test of an attachment compares reading with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fot.model.attention.rotary import rotate
from lightning_fot.model.passes.base import LayerCall, Pass


@dataclass(frozen=True)
class Stretch:
    """Tokens that are read between two moves of the window.

    Args:
        local: Numbers of the tokens in the window that came before.
        new: The tokens of the stretch.
        memory: Tokens in the memory.
    """

    local: list[int]
    new: list[int]
    memory: list[int]


def stretches(length: int, window: int, overlap: int, sinks: int) -> list[Stretch]:
    """What tokens see of a text whose window moves when it is full and a token comes."""
    found: list[Stretch] = []
    local: list[int] = []
    memory: list[int] = []
    start = 0
    while start < length:
        if len(local) == window:
            stays = local[:sinks] + local[window - overlap :]
            memory = memory + [token for token in local if token not in stays]
            local = stays
        new = list(range(start, min(length, start + window - len(local))))
        found.append(Stretch(local, new, memory))
        local, start = local + new, start + len(new)
    return found


class DensePass(Pass):
    """Attention of every layer over what is listed; no gradient reaches pairs of the memory.

    Args:
        parts: Of the text, in their order.
        window: The longest that a window becomes.
        device: Of the model.
        distance: At which all pairs of the memory are seen; None sees them at position 0, and tokens at their own.
    """

    serves_all_layers = True
    unrotated = True

    def __init__(self, parts: list[Stretch], window: int, device: torch.device, distance: int | None = None) -> None:
        self.parts, self.window, self.distance = parts, window, distance
        places = [len(part.local) + number for part in parts for number in range(len(part.new))]
        self.places = torch.tensor([places], device=device)
        # Each place is asked for once, and then that of each token.
        own = torch.arange(window, device=device)[None]
        further = [] if distance is None else [(distance - own).abs()]
        self.positions = torch.cat([own, *further, self.places], dim=1)

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        assert call.plain is not None
        outputs = []
        for part in self.parts:
            local, far = part.local + part.new, part.memory if call.is_memory_layer else []
            part_query, part_key = query[:, :, part.new], key[:, :, local]
            if call.rotary is not None and call.position_embeddings is not None:
                cos, sin = (half[:, : len(local)] for half in call.position_embeddings)
                part_query, part_key = rotate(call.rotary, part_query, part_key, (cos, sin))
            values = torch.cat([value[:, :, far].detach(), value[:, :, local]], dim=2)
            own = torch.ones(len(part.new), len(local), dtype=torch.bool, device=query.device)
            seen = own.tril(len(part.local))
            if call.sliding_window is not None:
                seen &= own.triu(len(part.local) - call.sliding_window + 1)
            hidden = torch.cat([~own[:, :1].expand(-1, len(far)), ~seen], dim=1)
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)[None, None]
            for rows, far_key in self._far_keys(call, key[:, :, far].detach(), len(part.local), len(part.new)):
                keys = torch.cat([far_key, part_key], dim=2)
                outputs.append(call.plain(part_query[:, :, rows], keys, values, mask[:, :, rows])[0])
        return torch.cat(outputs, dim=1).transpose(1, 2)

    def _far_keys(self, call: LayerCall, key: Tensor, first: int, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Queries, and keys of the memory as they see them.

        At a constant distance each query has keys of its own: rotated to ``distance`` places before it.

        Args:
            call: Of the layer.
            key: (B, G, M, D), not rotated.
            first: Place of the first query in its window.
            count: Queries.
        """
        if self.distance is None or call.rotary is None or call.position_embeddings is None or not key.shape[2]:
            yield slice(0, count), call.to_position_zero(key)
            return
        cos, sin = call.position_embeddings
        for number in range(count):
            place = first + number
            column = slice(self.window + place, self.window + place + 1)
            back = 1 if place >= self.distance else -1
            angles = (half[:, column].expand(-1, key.shape[2], -1) for half in (cos, back * sin))
            yield slice(number, number + 1), call.rotary(key[:, :1], key, *angles)[1]
