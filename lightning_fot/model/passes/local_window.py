"""``MemoryCache``: a transformers ``Cache`` whose local window moves in strides and hands what leaves it to the memory.

The ``generate`` of transformers refuses keyword arguments that it does not know, so the memory travels in the cache.
Positions always count from the start of the local window, however far a text has come: local keys are rotated anew when
it moves.

A *column* is a place that all rows share. Local tokens of a row are packed to the right: a row with fewer than others
has padding in front, and moves its window when it is full itself, as it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_fot.errors import SettingError
from lightning_fot.memory.token_log import TokensRead
from lightning_fot.model.attention.angles import Angles
from lightning_fot.model.attention.rotary import Embeddings
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.attention.whole import causal_mask
from lightning_fot.model.passes.base import LayerCall, StopForward, TextPass
from lightning_fot.model.passes.columns import Columns
from lightning_fot.model.passes.local_layer import LocalLayer
from lightning_fot.model.passes.recorder import Recorder, scoring, searched_queries
from lightning_fot.model.passes.state_layer import StateFacts, StateLayer, States, new_layer

if TYPE_CHECKING:
    from lightning_fot.config.memory import MemoryConfig
    from lightning_fot.memory.memory import Memory


class MemoryCache(Cache, TextPass):
    """Local window and memory of texts that go on token by token.

    Args:
        memory: What is attended to; extended when a local window moves.
        config: Window, overlap and sinks.
        num_layers: Layers of the backbone.
        recorder: As for :class:`~lightning_fot.model.passes.window.WindowPass`.
        states: Which layers keep states, in place of keys or beside them; None means none.
        latents: Layers that keep latents in place of keys and values.
    """

    is_compileable = False

    def __init__(
        self,
        memory: Memory,
        config: MemoryConfig,
        num_layers: int,
        recorder: Recorder | None = None,
        states: StateFacts | None = None,
        latents: Collection[int] = (),
    ) -> None:
        self.columns = Columns(config.window)
        states = states or StateFacts()
        layers = [
            new_layer(self.columns, index in memory.layers or index in latents, states.layers.get(index))
            for index in range(num_layers)
        ]
        self._one_by_one = states.one_by_one
        self.local_layers = {index: layer for index, layer in enumerate(layers) if isinstance(layer, LocalLayer)}
        self.state_layers = [layer for layer in layers if isinstance(layer, StateLayer)]
        super().__init__(layers=[*layers])
        self.memory = memory
        self.config = config
        self.recorder = recorder
        self.ends: Tensor | None = None
        """(B,) int64 on the CPU: column at which the tokens of each row end; what follows is padding."""
        self.names: Sequence[str | None] | None = None
        """Documents that the rows belong to, where they have any."""
        self.stop_layer: int | None = None
        """Memory layer above which no forward computes anything, for texts that are only read; None computes all."""
        self._stopped = False
        self.before_first: Callable[[int], None] | None = None
        """Called once with the number of rows, before the first forward."""
        self.widths = [0] * memory.batch_size
        """Local tokens of each row."""
        self.positions: Tensor = torch.zeros(1, 0, dtype=torch.int64)
        """(1 or B, n) int64: places, counted from each row's first local token, of the columns from ``rotated`` on."""
        rows, device = memory.batch_size, memory.shape.device
        self._ids = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self._storable = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        # (B, S), of the forward in progress; None where every column of every row is a token.
        self._valid: Tensor | None = None
        self._arriving = [0] * rows
        self._moved = False
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._zero: dict[int, Callable[[Tensor], Tensor]] = {}
        self._angles: list[Angles] = []
        # The embeddings that layers were given in the forward in progress, by identity.
        self._given: dict[int, tuple[Embeddings, Angles]] = {}
        # Beams: rows are copies in groups of this size; columns and memory that a group still has in common.
        self._group = 1
        self._common = 0
        self._diverged = False
        # Rows that the forward in progress brings padding alone, and the states to give back to them.
        self._idle: tuple[Tensor, list[States]] | None = None
        self._broken = False

    @property
    def seen(self) -> int:
        """Columns of text read, those in memory included."""
        return self.columns.seen

    @seen.setter
    def seen(self, count: int) -> None:
        self.columns.seen = count

    @property
    def room(self) -> int:
        """Tokens that fit before, or right after, the next move of the window of any row that goes on.

        A state takes what comes for text: beside states a forward ends where a row does.
        """
        if self._goes_one_by_one:
            return 1
        rooms = []
        for row, width in enumerate(self.widths):
            if self.ends is None or int(self.ends[row]) > self.seen:
                if self.ends is not None and self.state_layers:
                    rooms.append(int(self.ends[row]) - self.seen)
                kept = min(self.config.sink_tokens + self.config.overlap, width)
                rooms.append(self.config.window - (width if width < self.config.window else kept))
        return min(rooms, default=self.config.window)

    @property
    def _goes_one_by_one(self) -> bool:
        return self._one_by_one and any(any(layer.has_previous_state.values()) for layer in self.state_layers)

    def begin(self, ids: Tensor, valid: Tensor | None = None) -> None:
        """Makes room for L columns before a forward: moves the windows that would overflow.

        Args:
            ids: (B, L) int64; -1 where only embeddings are known.
            valid: (B, L), False or 0 for padding; None means none.

        Raises:
            SettingError: So many tokens do not fit a window at once, or states cannot be kept free of padding.
        """
        if self._broken:
            raise SettingError(
                "past_key_values", type(self).__name__, "has states of a forward that failed", "Read the text anew."
            )
        if self.before_first is not None:
            read, self.before_first = self.before_first, None
            read(len(ids))
        window, device = self.config.window, self._ids.device
        tokens = self._tokens(ids, valid)
        self._arriving = [ids.shape[1]] * len(ids) if tokens is None else tokens.sum(1).tolist()
        self._keep_states(ids.shape[1])
        ends = [width + count for width, count in zip(self.widths, self._arriving, strict=True)]
        full = [end > window and count > 0 for end, count in zip(ends, self._arriving, strict=True)]
        if any(full):
            self._stride(torch.tensor(full, device=device))
        ends = [width + count for width, count in zip(self.widths, self._arriving, strict=True)]
        if max(ends) > window:
            kept = self.widths[ends.index(max(ends))]
            raise SettingError(
                "input_ids", ids.shape[1], f"tokens at once do not fit a window of {window} that keeps {kept}",
                "Use the attached model's generate or call, which cut long input.",
            )  # fmt: skip
        self.columns.committed = self._ids.shape[1]
        self.columns.rotated = 0 if self._moved else self.columns.committed
        self._masks.clear()
        self._given.clear()
        if tokens is None and min(self.widths) == self.columns.committed:
            self._valid = None
            places = torch.arange(self.columns.committed + ids.shape[1], device=device)[None]
        else:
            fresh = torch.ones(ids.shape, dtype=torch.bool, device=device) if tokens is None else tokens
            self._valid = torch.cat([self._present(), fresh], dim=1)
            places = (self._valid.cumsum(1) - 1).clamp_min(0)
        self.positions = places[:, self.columns.rotated :]
        storable = (places[:, self.columns.committed :] >= self.config.skip_window_start).expand(ids.shape)
        self._ids = torch.cat([self._ids, ids.to(device)], dim=1)
        self._storable = torch.cat([self._storable, storable], dim=1)

    def end(self, completed: bool) -> None:
        """Counts the tokens of a forward, or takes back those of one that failed."""
        completed, self._stopped = completed or self._stopped, False
        if not completed:
            self._broken = bool(self.state_layers)
            self._ids, self._storable = (
                self._ids[:, : self.columns.committed],
                self._storable[:, : self.columns.committed],
            )
            return
        self._moved = False
        if self._idle is not None:
            rows, before = self._idle
            for layer, states in zip(self.state_layers, before, strict=True):
                layer.restore(rows, states)
        self.seen += self._ids.shape[1] - self.columns.committed
        self.widths = [width + count for width, count in zip(self.widths, self._arriving, strict=True)]
        if self._valid is not None and not torch.equal(self._valid, self._present()):
            self._arrange(self._valid)

    def finish(self, rows: Tensor | None = None) -> None:
        """Moves all that is local into memory, at the end of a text.

        Args:
            rows: (B,) bool, rows whose text has ended; None means all.
        """
        present = self._present()
        leaving = present if rows is None else present & rows.to(present.device)[:, None]
        self._store(leaving)
        self._arrange(present & ~leaving)

    def before_rotation(self, call: LayerCall) -> None:
        """Notes what keys of a layer without a memory are rotated with, once for all layers that share it."""
        layer, embeddings = self.local_layers[call.layer_idx], call.position_embeddings
        if embeddings is None:
            return
        if id(embeddings) not in self._given:
            angles = layer.angles
            if angles is None:
                angles = Angles()
                self._angles.append(angles)
            angles.put(self.columns.rotated, embeddings)
            self._given[id(embeddings)] = embeddings, angles
        layer.before_rotation(call, self._given[id(embeddings)][1])

    def rotate(self, call: LayerCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`LocalLayer.rotate`, for any layer; notes how keys of a memory layer are to be stored."""
        if call.is_memory_layer and self.columns.rotated == 0:
            # The call knows the rotation of column 0, at which positions start.
            self._zero[call.layer_idx] = call.to_position_zero
        return self.local_layers[call.layer_idx].rotate(call, query, key)

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of any layer over the local window, of memory layers over the memory as well."""
        local_query, local_key = self.rotate(call, query, key)
        mask = self._mask(query.shape[2], key.shape[2], call.sliding_window, query.device)
        outside = on_weights = far_query = None
        if call.is_memory_layer:
            far_query = call.asking(query, local_query)
            queries = searched_queries(self.memory, call.layer_idx, far_query, self.recorder)
            if call.layer_idx == self.stop_layer:
                self._stopped = True
                raise StopForward
            asked = scoring(call, queries, scale, softcap, self.recorder)
            layer = self.memory.layers[call.layer_idx]
            outside = layer.read(queries, self.config.top_k, self.config.dense_pairs, asked)
            if self.recorder is not None:
                valid = None if self._valid is None else self._valid[:, -query.shape[2] :]
                on_weights = self.recorder.on_weights(self.memory, call.layer_idx, outside, valid)
        return attend(
            local_query,
            local_key,
            value,
            outside,
            far_query=far_query,
            scale=scale,
            mask=mask,
            softcap=softcap,
            gate=call.gate,
            dropout=call.dropout,
            sinks=call.sinks,
            on_weights=on_weights,
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gives row i what row ``beam_idx[i]`` has (beam search); what a group of beams shares stays where it is."""
        rows = beam_idx.to(self._ids.device)
        places = torch.arange(len(rows), device=rows.device)
        if torch.equal(rows, places):
            return
        if not torch.equal(rows // self._group, places // self._group):
            self._group, self._common, self._diverged = 1, 0, True
        for layer in self.local_layers.values():
            layer.reorder(rows, self._common, self._ids.shape[1])
        for state in self.state_layers:
            state.select(rows)
        for angles in self._angles:
            angles.select(rows)
        self._ids, self._storable = self._ids[rows], self._storable[rows]
        self.widths = [self.widths[row] for row in rows.tolist()]
        # Until tokens of their own have left the window, beams of a prompt have the same memory: nothing to reorder.
        if self._diverged:
            self.memory = self.memory.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, memory included."""
        if repeats == 1:
            return
        rows = torch.arange(len(self.widths), device=self._ids.device).repeat_interleave(repeats)
        for layer in self.local_layers.values():
            layer.repeat(rows, self._ids.shape[1])
        for state in self.state_layers:
            state.select(rows)
        for angles in self._angles:
            angles.select(rows)
        self._ids, self._storable = self._ids[rows], self._storable[rows]
        self.widths = [self.widths[row] for row in rows.tolist()]
        self.memory = self.memory.select_rows(rows)
        self._group, self._common, self._diverged = repeats, self._ids.shape[1], False

    def _tokens(self, ids: Tensor, valid: Tensor | None) -> Tensor | None:
        """(B, L) bool: which of the new columns are tokens; None where all are."""
        tokens = None if valid is None else valid.to(self._ids.device).bool()
        if self.ends is not None and int(self.ends.min()) < self.seen + ids.shape[1]:
            before_end = torch.arange(self.seen, self.seen + ids.shape[1]) < self.ends[:, None]
            before_end = before_end.to(self._ids.device)
            tokens = before_end if tokens is None else tokens & before_end
        return None if tokens is None or bool(tokens.all()) else tokens

    def _keep_states(self, length: int) -> None:
        """Keeps the states of rows that get padding alone.

        Raises:
            SettingError: A row gets tokens and padding: its states would take the padding for text.
        """
        if self._goes_one_by_one and any(layer.requires_grad for layer in self.state_layers):
            raise SettingError(
                "input_ids", "with gradients", "cannot go on from states that this backbone writes in place",
                "Read under torch.no_grad(), or train on crossbatches.",
            )  # fmt: skip
        if length > 1 and self._goes_one_by_one:
            raise SettingError(
                "input_ids", length, "tokens at once cannot go on from the states of this backbone",
                "Use the attached model's generate or call, which read them one by one.",
            )  # fmt: skip
        self._idle = None
        idle = [count == 0 for count in self._arriving]
        if not self.state_layers or (length == min(self._arriving) and not any(idle)):
            return
        if any(0 < count < length for count in self._arriving):
            raise SettingError(
                "attention_mask", self._arriving, f"are the tokens among {length} columns of rows, and layers with a "
                "state cannot leave padding out", "Use the attached model's generate or call, which cut such input.",
            )  # fmt: skip
        self._idle = torch.tensor(idle), [layer.kept() for layer in self.state_layers]

    def _present(self) -> Tensor:
        """(B, S) bool: columns that hold a token of the row, when rows are packed to the right."""
        width = self._ids.shape[1]
        starts = width - torch.tensor(self.widths, device=self._ids.device)
        return torch.arange(width, device=self._ids.device) >= starts[:, None]

    def _mask(self, length: int, width: int, sliding: int | None, device: torch.device) -> Tensor | None:
        """(1 or B, 1, L, S) bool: local keys that each new token sees; None where that is plain causality."""
        if sliding is not None and sliding >= width:
            sliding = None
        if self._valid is None and sliding is None and length in (1, width):
            return None
        if (length, width, sliding) not in self._masks:
            mask = causal_mask(length, width, device)
            if sliding is not None:
                mask = mask & ~causal_mask(length, width, device).tril(width - length - sliding)
            mask = mask[None]
            if self._valid is not None:
                # A padding token sees itself: without anything to see its row would be NaN.
                own = torch.eye(width, dtype=torch.bool, device=device)[width - length :]
                mask = mask & self._valid[:, None].to(device) | own
            self._masks[length, width, sliding] = mask[:, None]
        return self._masks[length, width, sliding]

    def _stride(self, full: Tensor) -> None:
        """Moves the windows of the rows ``full`` (B,) bool: sinks and overlap stay."""
        present = self._present()
        widths = present.sum(1, keepdim=True)
        places = torch.arange(present.shape[1], device=present.device) - (present.shape[1] - widths)
        stays = (places < self.config.sink_tokens) | (places >= widths - self.config.overlap) | ~full[:, None]
        self._store(present & ~stays)
        self._moved = True
        self._arrange(present & stays)

    def _store(self, leaving: Tensor) -> None:
        """Hands the tokens ``leaving`` (B, S) bool to the memory, each row's in their order."""
        if not bool(leaving.any()):
            return
        stored = leaving & self._storable & bool(self.memory.layers)
        counts = stored.sum(1).cpu()
        order = torch.argsort((~stored).int(), dim=1, stable=True)[:, : int(counts.max())]
        pairs = {}
        for index in self.memory.layers:
            keys, values = self.local_layers[index].taken(order)
            pairs[index] = (self._zero[index](keys), values)
        columns = leaving.any(0).nonzero()[:, 0]
        read = TokensRead(self._ids[:, columns], leaving[:, columns], stored[:, columns], self.names)
        self.memory.append(pairs, counts, read)
        self._diverged |= bool(leaving[:, self._common :].any())

    def _arrange(self, kept: Tensor) -> None:
        """Keeps the tokens ``kept`` (B, S) bool as the local ones, packed to the right."""
        self.widths = kept.sum(1).tolist()
        order = torch.argsort(kept.int(), dim=1, stable=True)[:, kept.shape[1] - max(self.widths) :]
        common = ((order < self._common) | ~kept.gather(1, order)).all(0)
        self._common = int(common.int().cumprod(0).sum())
        for layer in self.local_layers.values():
            layer.arrange(order, kept.shape[1], self._moved)
        for angles in self._angles:
            angles.arrange(order, self._moved)
        self._ids, self._storable = self._ids.gather(1, order), self._storable.gather(1, order)
