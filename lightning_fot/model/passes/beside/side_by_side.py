"""Texts side by side: one forward reads a token of each, beside local windows and memories of their own.

A text keeps its :class:`MemoryCache`, which moves its window and its memory as if it were alone. What local windows
hold lies in tensors of all rows (:class:`RowBuffers`), so that a layer attends to all of them at once; texts whose
memories hold the same are searched for at once too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lightning_fot.memory.found import Attended, Retrieved, Shown
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.attention.whole import fold_heads
from lightning_fot.model.passes.base import LayerCall, TextPass
from lightning_fot.model.passes.beside.row_buffers import RowBuffers
from lightning_fot.retrievers.base import Retriever

if TYPE_CHECKING:
    from lightning_fot.model.attention.rotary import Embeddings
    from lightning_fot.model.passes.local_window import MemoryCache


Note = Callable[[Tensor], None]


class SideBySide(Cache, TextPass):
    """The cache of a batch of texts that go on by one token at a time, and join and leave at any.

    Args:
        num_layers: Layers of the backbone; each keeps keys alone.
    """

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.caches: list[MemoryCache] = []
        """Of the texts, by row."""
        layers = [_Layer(self) for _ in range(num_layers)]
        self._rows = [layer.rows for layer in layers]
        super().__init__(layers=[*layers])
        self.widths: list[int] = []
        """Local columns of each row, those of the forward in progress included."""
        # Rows whose local keys are all rotated in this forward: their windows have moved, or they begin.
        self._anew: list[int] = []
        # Rows whose memories hold the same and are searched in the same way.
        self._groups: list[list[int]] = []
        self._masks: dict[int | None, Tensor | None] = {}
        # Embeddings that all rows were told of, by identity; `_parts` keeps them.
        self._told: set[int] = set()
        # Each row's part of the embeddings that layers are given, by identity; kept with them, so that none is reused.
        self._parts: dict[int, tuple[Embeddings, list[Embeddings]]] = {}

    def join(self, cache: MemoryCache) -> None:
        """Takes a text in, as the last row."""
        for index, rows in enumerate(self._rows):
            rows.join(cache.local_layers[index], cache.widths[0])
        self.caches.append(cache)

    def leave(self, cache: MemoryCache) -> None:
        """Lets a text go, which can go on alone. The last row takes its place."""
        row = next(row for row, known in enumerate(self.caches) if known is cache)
        for rows in self._rows:
            rows.leave(row)
        last = self.caches.pop()
        if last is not cache:
            self.caches[row] = last

    def begin(self, ids: Tensor, valid: Tensor | None = None) -> None:
        """Makes room in each cache; (n, 1) ids without padding."""
        for row, cache in enumerate(self.caches):
            cache.begin(ids[row : row + 1])
        self.widths = [cache.columns.committed + 1 for cache in self.caches]
        self._anew = [row for row, cache in enumerate(self.caches) if cache.columns.rotated == 0]
        # Keys that are rotated anew need the places of all columns: such a row has more than others.
        width = max(cache.positions.shape[1] for cache in self.caches)
        self.positions = torch.cat(
            [torch.nn.functional.pad(cache.positions, (width - cache.positions.shape[1], 0)) for cache in self.caches]
        )
        self._groups = _alike(self.caches)
        self._masks.clear()
        self._parts.clear()
        self._told.clear()

    def end(self, completed: bool) -> None:
        """Ends the forward in each cache."""
        for cache in self.caches:
            cache.end(completed)

    def before_rotation(self, call: LayerCall) -> None:
        """Told of each layer without a memory that rotates."""
        # What a text's keys are rotated with it notes once for all layers that share it.
        noted = id(call.position_embeddings) in self._told
        for row in self._anew if noted else range(len(self.caches)):
            self.caches[row].before_rotation(self._of_row(call, row))
        self._told.add(id(call.position_embeddings))

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention (n, H, 1, D) of each row over its own local window and memory."""
        local_query, keys, values = self._local(call, query, key)
        far_query = call.asking(query, local_query) if call.is_memory_layer else None
        mask = self._mask(call.sliding_window, query.device)

        def of(rows: list[int], outside: Retrieved | Shown | None, note: Note | None = None) -> Tensor:
            given: tuple[Any, ...] = local_query, keys, values, far_query, mask
            if rows != list(range(len(self.caches))):
                index = torch.tensor(rows, device=query.device)
                given = tuple(part if part is None else part[index] for part in given)
            return attend(
                given[0], given[1], given[2], outside, far_query=given[3], scale=scale, mask=given[4],
                softcap=softcap, gate=call.gate, dropout=call.dropout, sinks=call.sinks, on_weights=note,
            )  # fmt: skip

        if far_query is None:
            return of(list(range(len(self.caches))), None)
        done: list[tuple[list[int], Tensor]] = []
        alone: list[int] = []
        found: list[tuple[list[int], Retrieved]] = []
        for rows in self._groups:
            outside = self._read(call.layer_idx, rows, far_query)
            if isinstance(outside, Retrieved):
                found.append((rows, outside))
            elif outside is None:
                alone += rows
            else:
                for row in rows:
                    done.append(([row], of([row], outside, self._note(call.layer_idx, [row], outside))))
        if alone:
            done.append((alone, of(alone, None)))
        if found:
            rows, pairs = _joined(found)
            done.append((rows, of(rows, pairs, self._note(call.layer_idx, rows, pairs))))
        order = torch.tensor([row for rows, _ in done for row in rows], device=query.device)
        return torch.cat([output for _, output in done])[order.argsort()]

    def _local(self, call: LayerCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (n, H, 1, D) and keys (n, G, S, D), and values, as wide as the longest row."""
        index, width = call.layer_idx, max(self.widths)
        rows = self._rows[index]
        keys, values = rows.read(rows.given, width), rows.read("values", width)
        if call.expand is not None:
            keys, values = call.expand(keys, values)
        local_query, seen = query, keys
        if rows.given == "keys" and call.rotary is not None and call.position_embeddings is not None:
            cos, sin = (part[:, -1:] for part in call.position_embeddings)
            local_query, rotated = call.rotary(query, key, cos, sin)
            rows.write("rotated", rotated, [own - 1 for own in self.widths])
            seen = rows.read("rotated", width)
        for row in self._anew:
            part = slice(row, row + 1)
            self.caches[row].rotate(self._of_row(call, row), query[part], keys[part, :, : self.widths[row]])
        return local_query, seen, values

    def _mask(self, sliding: int | None, device: torch.device) -> Tensor | None:
        """(n, 1, 1, S) bool: the local columns that each row's token sees; None where all see all."""
        if sliding not in self._masks:
            width = max(self.widths)
            starts = [0 if sliding is None else max(0, own - sliding) for own in self.widths]
            if not any(starts) and min(self.widths) == width:
                self._masks[sliding] = None
            else:
                columns = torch.arange(width, device=device)
                begins, ends = (torch.tensor(ends, device=device)[:, None] for ends in (starts, self.widths))
                self._masks[sliding] = ((columns >= begins) & (columns < ends))[:, None, None]
        return self._masks[sliding]

    def _read(self, layer_idx: int, rows: list[int], far_query: Tensor) -> Retrieved | Shown | None:
        """What rows of the same memory attend to: pairs found (n, G, R, K, D), or shown (1, G, M, D)."""
        cache = self.caches[rows[0]]
        layer = cache.memory.layers[layer_idx]
        # (n, G, R, D): the queries of a text beside one another, as it would search with them alone.
        queries = fold_heads(far_query[rows], layer.kv_heads)
        for row, own in zip(rows, queries, strict=True):
            beside = self.caches[row].memory.layers[layer_idx]
            retriever = beside.retriever
            if not isinstance(retriever, Retriever) or type(retriever).observe is not Retriever.observe:
                beside.observe(own[None])
        count, heads, repeats, _ = queries.shape
        asked = queries.transpose(0, 1).flatten(1, 2)[None]
        outside = layer.read(asked, cache.config.top_k, cache.config.dense_pairs)
        # No scoring is given: pairs that lie elsewhere are brought here.
        assert not isinstance(outside, Attended)
        if not isinstance(outside, Retrieved):
            return outside

        def by_row(tensor: Tensor) -> Tensor:
            return tensor.view(heads, count, repeats, *tensor.shape[3:]).transpose(0, 1)

        return Retrieved(*(by_row(part) for part in _parts(outside)))

    def _note(self, layer_idx: int, rows: list[int], outside: Retrieved | Shown) -> Note | None:
        """Hands each row's weights (n, G, R, K) to its recorder; None where no row has one."""
        takers = []
        for place, row in enumerate(rows):
            cache = self.caches[row]
            own = outside
            if isinstance(outside, Retrieved):
                own = Retrieved(*(part[place : place + 1] for part in _parts(outside)))
            if cache.recorder is not None:
                take = cache.recorder.on_weights(cache.memory, layer_idx, own, None)
                if take is not None:
                    takers.append((place, take))
        if not takers:
            return None

        def note(weights: Tensor) -> None:
            for place, take in takers:
                take(weights[place : place + 1])

        return note

    def _of_row(self, call: LayerCall, row: int) -> LayerCall:
        """The call with that row's part of the embeddings."""
        given = call.position_embeddings
        if given is None:
            return replace(call)
        if id(given) not in self._parts:
            self._parts[id(given)] = (
                given,
                [_own(given, number, cache.positions.shape[1]) for number, cache in enumerate(self.caches)],
            )
        return replace(call, position_embeddings=self._parts[id(given)][1][row])


def _alike(caches: Sequence[MemoryCache]) -> list[list[int]]:
    """Rows whose memories hold the same and are searched in the same way, together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, cache in enumerate(caches):
        memory = cache.memory
        retrievers = [layer.retriever for layer in memory.layers.values()]
        settings = [
            getattr(retriever, name) for retriever in retrievers for name in getattr(retriever, "query_args", ())
        ]
        groups.setdefault((memory.content, *settings), []).append(row)
    return list(groups.values())


def _parts(pairs: Retrieved) -> tuple[Tensor, ...]:
    assert pairs.rows is not None
    return pairs.keys, pairs.values, pairs.valid, pairs.rows


def _joined(found: Sequence[tuple[list[int], Retrieved]]) -> tuple[list[int], Retrieved]:
    """Pairs of several groups of rows as those of one."""
    rows = [row for group, _ in found for row in group]
    if len(found) == 1:
        return rows, found[0][1]
    parts = zip(*(_parts(pairs) for _, pairs in found), strict=True)
    return rows, Retrieved(*(torch.cat(part) for part in parts))


def _own(embeddings: Embeddings, row: int, width: int) -> Embeddings:
    cos, sin = (part[row : row + 1] if len(part) > 1 else part for part in embeddings)
    return cos[:, cos.shape[1] - width :], sin[:, sin.shape[1] - width :]


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of all rows."""

    def __init__(self, beside: SideBySide) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = RowBuffers()
        self._beside = beside

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (n, G, 1, D) keys and values; gives them back, since attention takes all of them from here."""
        columns = [width - 1 for width in self._beside.widths]
        self.rows.write(self.rows.given, key_states, columns)
        self.rows.write("values", value_states, columns)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As small as can be: masks are made by :class:`SideBySide`."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that the longest text has seen."""
        return max(cache.seen for cache in self._beside.caches)

    def get_max_length(self) -> int:
        """-1: texts may go on for ever."""
        return -1
