"""Local keys and values of one layer while a text goes on token by token."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lightning_fot.model.attention.angles import Angles
from lightning_fot.model.attention.rotary import RotaryFn, rotate, unrotate
from lightning_fot.model.passes.base import ExpandFn, LayerCall
from lightning_fot.model.passes.columns import Columns

_FIRST_CAPACITY = 64


class SharedRoom(Protocol):
    """Where buffers of a layer lie beside those of other texts."""

    def reserve(self, layer: LocalLayer, name: str, like: Tensor, capacity: int) -> Tensor:
        """The layer's buffer (B, G, C, D) of that name, C at least ``capacity``; what is there stays."""


class LocalLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each (B, G, S, D) at the front of a larger buffer.

    A memory layer keeps keys in two forms: as they are stored in the memory, and rotated. Rotated ones serve every
    token until the window moves, and then are made anew. Another layer is given rotated keys and keeps only those; when
    the window moves, the rotation is taken off again. A layer of latents is given latents, and keeps them, in the place
    of both; what is rotated, attended to and stored is made of them.

    Args:
        columns: Tells which columns a forward adds.
        unrotated: Whether keys come without rotation, and are kept so.
    """

    keys: Tensor
    """(B, G, S, D), a view; those of a memory layer are not rotated."""
    values: Tensor
    """(B, G, S, D): a view."""

    def __init__(self, columns: Columns, unrotated: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._columns = columns
        self.given = "keys" if unrotated else "rotated"
        """The buffer that new keys are written to."""
        self.angles: Angles | None = None
        self._rotary: RotaryFn | None = None
        self._expand: ExpandFn | None = None
        self.buffers: dict[str, Tensor] = {}
        """By name (B, G, C, D), C at least S: ``keys`` not rotated, ``rotated`` ones and ``values``, as far as it keeps
        them; ``plain``: keys that the next forward rotates."""
        self.shared: SharedRoom | None = None
        """Where the buffers lie, beside those of other texts; None keeps them here."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: buffers are made by the first keys and values."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, G, L, D) keys and values; returns all local ones."""
        self.is_initialized = True
        self.keys = self._write(self.given, key_states, self._columns.committed)
        self.values = self._write("values", value_states, self._columns.committed)
        return self.keys, self.values

    def before_rotation(self, call: LayerCall, angles: Angles) -> None:
        """Rotates keys that stayed when the window moved, in a layer whose new keys come rotated.

        Args:
            call: The call that is about to rotate the new ones.
            angles: What all its columns are rotated with.
        """
        self.angles, self._rotary = angles, call.rotary
        plain = self.buffers.pop("plain", None)
        if plain is None or call.rotary is None:
            return
        width = self._columns.committed
        plain = plain[:, :, :width]
        cos, sin = (part.float() for part in angles.first(width))
        self._write("rotated", call.rotary(plain[:, :1], plain, cos, sin)[1].to(self.buffers["values"].dtype), 0)

    def rotate(self, call: LayerCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates queries (B, H, L, D) of the last L columns, and those of all keys (B, G, S, D) that are not yet."""
        self._expand = call.expand
        if self.given == "rotated" or call.rotary is None or call.position_embeddings is None:
            return query, key
        start = self._columns.rotated
        local_query, rotated = rotate(call.rotary, query, key[:, :, start:], call.position_embeddings)
        return local_query, self._write("rotated", rotated, start)

    def taken(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not rotated, and values of the columns (B, n) int64, chosen for each row."""
        keys, values = _gather(self.buffers["keys"], columns), _gather(self.buffers["values"], columns)
        return (keys, values) if self._expand is None else self._expand(keys, values)

    def arrange(self, columns: Tensor, width: int, moved: bool) -> None:
        """Makes the columns (B, n) int64, chosen for each row, the local ones, in that order.

        Args:
            columns: Columns of each row.
            width: Columns there were.
            moved: Positions have changed: rotated keys are of no use any more.
        """
        if moved and self.given == "keys":
            self.buffers.pop("rotated", None)
        elif moved and self.angles is not None and self._rotary is not None and "rotated" in self.buffers:
            rotated = self.buffers.pop("rotated")[:, :, :width]
            self.buffers["plain"] = unrotate(self._rotary, rotated, self.angles.first(width))
        for name, buffer in self.buffers.items():
            self._write(name, _gather(buffer, columns), 0)

    def reorder(self, rows: Tensor, start: int, stop: int) -> None:
        """Gives row i the columns ``start`` to ``stop`` of row ``rows[i]``."""
        for buffer in self.buffers.values():
            buffer[:, :, start:stop] = buffer[:, :, start:stop].index_select(0, rows.to(buffer.device))

    def repeat(self, rows: Tensor, stop: int) -> None:
        """Makes row i what row ``rows[i]`` is, up to column ``stop``; there may be more rows than before."""
        for name, buffer in self.buffers.items():
            self.buffers[name] = buffer[:, :, :stop].index_select(0, rows.to(buffer.device))

    def capacity(self, width: int) -> int:
        """Columns worth making room for where ``width`` are needed."""
        return max(width, min(2 * width, self._columns.window), _FIRST_CAPACITY)

    def lasting_buffers(self) -> dict[str, Tensor]:
        """The buffers (B, G, C, D) that are kept from forward to forward."""
        return {name: buffer for name, buffer in self.buffers.items() if name != "plain"}

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As small as can be: masks are made by the cache, and those of transformers are not used."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, those in memory included."""
        return self._columns.seen

    def get_max_length(self) -> int:
        """-1: the text may go on for ever."""
        return -1

    def _write(self, name: str, new: Tensor, start: int) -> Tensor:
        """Writes (B, G, L, D) at column ``start`` and returns all columns up to the last written."""
        buffer, stop = self.buffers.get(name), start + new.shape[2]
        if torch.is_grad_enabled() and (new.requires_grad or (buffer is not None and buffer.requires_grad)):
            # A backward pass needs what was read before as it was: nothing may be written in place.
            buffer = new if buffer is None else torch.cat([buffer[:, :, :start], new], dim=2)
            self.buffers[name] = buffer
            return buffer
        if buffer is None or buffer.shape[2] < stop:
            capacity = self.capacity(stop)
            if self.shared is not None and name != "plain":
                grown = self.shared.reserve(self, name, new, capacity)
            else:
                grown = new.new_empty(*new.shape[:2], capacity, new.shape[3])
                if buffer is not None:
                    grown[:, :, :start] = buffer[:, :, :start]
            buffer = self.buffers[name] = grown
        buffer[:, :, start:stop] = new
        return buffer[:, :, :stop]


def _gather(buffer: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, n) of (B, G, S, D) → (B, G, n, D)."""
    index = columns.to(buffer.device)[:, None, :, None]
    return buffer.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[3]))
