"""``MemoryCache``: a transformers ``Cache`` whose local window moves in strides and hands what leaves it to the memory.

The ``generate`` of transformers refuses keyword arguments that it does not know, so the memory travels in the cache.
Local keys are kept un-rotated and rotated when used, so that positions always count from the start of the local window,
however far a text has come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lightning_fot.attention import attend, causal_mask
from lightning_fot.errors import SettingError
from lightning_fot.passes import LayerCall, Pass, searched_queries

if TYPE_CHECKING:
    from lightning_fot.config import MemoryConfig
    from lightning_fot.memory import Memory


class LocalLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Local keys (not rotated) and values of one layer, each (B, G, S, D)."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: MemoryCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes the first keys and values as they are."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, G, L, D) keys and values; returns all local ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a query sees, and the column of the first: only for transformers' own masks, which are not used."""
        width = self._cache.valid.shape[1]
        return width, max(0, self._cache.get_seq_length() + query_length - width)

    def get_seq_length(self) -> int:
        """Tokens seen so far, those in memory included."""
        return self._cache.seen

    def get_max_length(self) -> int:
        """-1: the text may go on for ever."""
        return -1

    def select(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Keeps the rows and columns named, in that order."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if rows is not None:
                tensor = tensor.index_select(0, rows.to(tensor.device))
            if columns is not None:
                tensor = tensor.index_select(2, columns.to(tensor.device))
            setattr(self, name, tensor)


class MemoryCache(Cache, Pass):
    """Local window and memory of texts that go on token by token.

    Args:
        memory: What is attended to; extended when the local window moves.
        config: Window, overlap and sinks.
        num_layers: Layers of the backbone.
        overlap: Local tokens kept when the window moves, in place of ``config.overlap``.
        recorder: As for :class:`~lightning_fot.passes.WindowPass`.
    """

    serves_all_layers = True
    is_compileable = False

    def __init__(
        self,
        memory: Memory,
        config: MemoryConfig,
        num_layers: int,
        overlap: int | None = None,
        recorder: dict[int, list[Tensor]] | None = None,
    ) -> None:
        self.local_layers = [LocalLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.local_layers))
        self.memory = memory
        self.config = config
        self.overlap = config.overlap if overlap is None else overlap
        self.recorder = recorder
        self.seen = 0
        rows, device = memory.batch_size, memory.shape.device
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.storable = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self._zero: dict[int, Callable[[Tensor], Tensor]] = {}
        self._committed = 0
        self._diverged = False

    @property
    def room(self) -> int:
        """Tokens that fit before, or right after, the next move of the window."""
        free = self.config.window - self.valid.shape[1]
        kept = min(self.config.sink_tokens + self.overlap, self.valid.shape[1])
        return free if free > 0 else self.config.window - kept

    @property
    def positions(self) -> Tensor:
        """(B, S) int64: places of local tokens, counted from the first that is no padding."""
        return (self.valid.cumsum(1) - 1).clamp_min(0)

    def begin(self, new_valid: Tensor) -> None:
        """Makes room for L tokens before a forward: moves the window where it is full.

        Args:
            new_valid: (B, L) bool, False for padding.
        """
        length = new_valid.shape[1]
        if self.valid.shape[1] + length > self.config.window:
            self._stride()
        if self.valid.shape[1] + length > self.config.window:
            raise SettingError(
                "input_ids",
                length,
                f"tokens at once do not fit a window of {self.config.window} that keeps {self.valid.shape[1]}",
                "Use the attached model's generate or call, which cut long input.",
            )
        self._committed = self.valid.shape[1]
        new_valid = new_valid.to(self.valid.device)
        self.valid = torch.cat([self.valid, new_valid], dim=1)
        fresh = (self.positions >= self.config.skip_window_start)[:, self._committed :]
        self.storable = torch.cat([self.storable, fresh & new_valid], dim=1)

    def end(self, completed: bool) -> None:
        """Counts the tokens of a forward, or takes back those of one that failed."""
        if completed:
            self.seen += self.valid.shape[1] - self._committed
        else:
            columns = torch.arange(self._committed, device=self.valid.device)
            for layer in self.local_layers:
                if layer.is_initialized and layer.keys.shape[2] > self._committed:
                    layer.select(columns=columns)
            self.valid = self.valid[:, : self._committed]
            self.storable = self.storable[:, : self._committed]

    def finish(self) -> None:
        """Moves all that is local into memory, at the end of a text."""
        self._move(torch.arange(0, device=self.valid.device))

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of any layer over the local window, of memory layers over the memory as well."""
        length, width = query.shape[2], key.shape[2]
        local_query, local_key, _ = call.local(query, key)
        allowed = causal_mask(length, width, query.device)
        if call.sliding_window is not None:
            allowed = allowed & ~causal_mask(length, width, query.device).tril(width - length - call.sliding_window)
        # A padding token sees itself: without anything to see its row would be NaN.
        own = torch.eye(width, dtype=torch.bool, device=query.device)[-length:]
        mask = ((allowed & self.valid[:, None, :]) | own)[:, None]
        outside = None
        if call.is_memory_layer:
            self._zero[call.layer_idx] = call.to_position_zero
            queries = searched_queries(self.memory, call.layer_idx, local_query, self.recorder)
            outside = self.memory.layers[call.layer_idx].read(queries, self.config.top_k)
        return attend(local_query, local_key, value, outside, scale=scale, mask=mask, softcap=softcap, gate=call.gate)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gives row i what row ``beam_idx[i]`` has (beam search)."""
        for layer in self.local_layers:
            layer.select(rows=beam_idx)
        beam_idx = beam_idx.to(self.valid.device)
        self.valid, self.storable = self.valid[beam_idx], self.storable[beam_idx]
        # Until the window moves, the beams of a prompt have the same memory: nothing to reorder.
        if self._diverged:
            self.memory = self.memory.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, memory included."""
        rows = torch.arange(self.memory.batch_size, device=self.valid.device).repeat_interleave(repeats)
        for layer in self.local_layers:
            layer.select(rows=rows)
        self.valid, self.storable = self.valid[rows], self.storable[rows]
        self.memory = self.memory.select_rows(rows)

    def _stride(self) -> None:
        width = self.valid.shape[1]
        sinks = torch.arange(min(self.config.sink_tokens, width))
        tail = torch.arange(max(len(sinks), width - self.overlap), width)
        self._move(torch.cat([sinks, tail]).to(self.valid.device))

    def _move(self, kept: Tensor) -> None:
        """Moves all local columns but ``kept`` to memory."""
        width = self.valid.shape[1]
        leaving = torch.ones(width, dtype=torch.bool, device=kept.device)
        leaving[kept] = False
        columns = leaving.nonzero()[:, 0]
        if len(columns):
            storable = self.storable[:, columns]
            counts = storable.sum(1).cpu()
            # Rows hold padding at different places: stored tokens first, in their order.
            order = torch.argsort((~storable).int(), dim=1, stable=True)[:, : int(counts.max())]
            pairs = {}
            for index in self.memory.layers:
                layer = self.local_layers[index]
                moved = []
                for tensor in (self._zero[index](layer.keys), layer.values):
                    part = tensor.index_select(2, columns)
                    places = order[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
                    moved.append(part.gather(2, places))
                pairs[index] = (moved[0], moved[1])
            if int(counts.max()):
                self.memory.append(pairs, counts)
            self.memory.tokens_seen += self.valid[:, columns].sum(1).cpu()
            self._diverged = True
        for layer in self.local_layers:
            layer.select(columns=kept)
        self.valid, self.storable = self.valid[:, kept], self.storable[:, kept]
