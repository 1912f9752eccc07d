"""What a memory layer does during one call of the model: read a window beside a memory, or train a crossbatch.

A pass is made for each call and holds everything that the call adds, so that an interrupted call changes no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lightning_fot.attention import Retrieved, Shown, attend, fold_heads
from lightning_fot.crossbatch import RowTable, crossbatch_attention
from lightning_fot.positions import RotaryFn, at_position_zero, rotate

if TYPE_CHECKING:
    from lightning_fot.attribution import AttentionTrace
    from lightning_fot.distributed import RowGather
    from lightning_fot.memory import Memory

Pairs = dict[int, tuple[Tensor, Tensor]]
AttentionFn = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Recorder:
    """What is noted while memory layers read; None for what is not wanted.

    Args:
        queries: By layer, a list of searched queries (B·G, R·T, D), one a window.
        attention: Collects the weights of memory pairs.
    """

    queries: dict[int, list[Tensor]] | None = None
    attention: AttentionTrace | None = None

    def on_weights(
        self, memory: Memory, layer_idx: int, outside: Retrieved | Shown | None, valid: Tensor | None
    ) -> Callable[[Tensor], None] | None:
        """What :func:`~lightning_fot.attention.attend` calls with the weights of ``outside``; None where nothing does.

        Args:
            memory: What is attended to.
            layer_idx: Layer.
            outside: Pairs of the memory.
            valid: (B, T) bool, False for queries of padding; None means that there is none.
        """
        if self.attention is None or outside is None:
            return None
        rows = outside.rows if isinstance(outside, Retrieved) else None
        return partial(self.attention.add, layer_idx, rows=rows, valid=valid, forgotten=memory.forgotten)

    def answering(self, answering: bool) -> None:
        """Says whether the queries that come choose the tokens of an answer."""
        if self.attention is not None:
            self.attention.answering = answering


def searched_queries(memory: Memory, layer_idx: int, query: Tensor, recorder: Recorder | None) -> Tensor:
    """Queries (B, H, T, D) in the form of a search, (B, G, R·T, D); the retriever and the recorder see them."""
    layer = memory.layers[layer_idx]
    folded = fold_heads(query, layer.kv_heads)
    seen = folded.detach().flatten(0, 1)
    layer.retriever.observe(seen)
    if recorder is not None and recorder.queries is not None:
        recorder.queries.setdefault(layer_idx, []).append(seen.clone())
    return folded


class StopForward(Exception):
    """Ends a forward once the last memory layer has its keys and values: reading needs nothing above."""


@dataclass
class LayerCall:
    """One attention layer within one call: handed from the layer's hook to the attention function.

    Args:
        layer_idx: Number of the layer.
        backend: The attention function that the backbone used before.
        current: The pass in progress, None when the model is called as a plain backbone.
        position_embeddings: The real (cos, sin), each (B or 1, T, R); None for layers that do not rotate.
        rotary: The backbone's ``apply_rotary_pos_emb``; None for layers that do not rotate.
        gate: (H,) logits of the memory's share, None for one softmax.
        score_factor: Factor on scores, beside the backbone's own.
        is_memory_layer: Whether the layer attends to the memory.
        sliding_window: Local tokens that the backbone lets this layer see, None for all.
        plain_at_zero: Whether rotation at position 0 leaves keys as they are, bit for bit.
        dropout: Share of attention weights that the backbone drops, 0 outside training.
    """

    layer_idx: int
    backend: AttentionFn
    current: Pass | None = None
    position_embeddings: tuple[Tensor, Tensor] | None = None
    rotary: RotaryFn | None = None
    gate: Tensor | None = None
    score_factor: float = 1.0
    is_memory_layer: bool = True
    sliding_window: int | None = None
    plain_at_zero: bool = False
    dropout: float = 0.0

    def local(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, L, D), rotated keys, and the keys as if at position 0, both (B, G, S, D); L <= S."""
        if self.rotary is None or self.position_embeddings is None:
            return query, key, key
        rotated_query, rotated_key = rotate(self.rotary, query, key, self.position_embeddings)
        return rotated_query, rotated_key, self.to_position_zero(key)

    def to_position_zero(self, key: Tensor) -> Tensor:
        """Keys (B, G, S, D) as the memory stores them."""
        if self.plain_at_zero or self.rotary is None or self.position_embeddings is None:
            return key
        cos, sin = self.position_embeddings
        # The first local column always is at position 0.
        return at_position_zero(self.rotary, key, (cos[:1, :1], sin[:1, :1]))


class Pass(ABC):
    """What memory layers do during one call."""

    serves_all_layers: ClassVar[bool] = False
    """Whether the other layers' attention is computed by the pass too, from queries and keys that are rotated."""
    unrotated: ClassVar[bool] = False
    """Whether those come before rotation, as they do in memory layers."""
    positions: Tensor | None = None
    """(1 or B, S) int64: what the rotary modules are asked for, those of the call's tokens last; None leaves them."""
    replayable: ClassVar[bool] = False
    """Whether a layer may be run again with the same outcome, as gradient checkpointing does."""

    def before_rotation(self, call: LayerCall) -> None:
        """Told of each layer without a memory that rotates, if the pass serves all layers."""
        return

    @abstractmethod
    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Output (B, H, T, D) of a memory layer for not yet rotated query (B, H, T, D), key and value (B, G, T, D)."""


@dataclass
class WindowPass(Pass):
    """Reads one window: it attends to the memory, and its pairs wait in ``pairs`` until the whole window is read.

    Args:
        memory: What is attended to; not changed by the pass.
        top_k: Pairs retrieved for each query.
        stop_layer: Memory layer above which nothing is needed; None computes the whole forward.
        recorder: Notes what is searched and attended to; None notes nothing.
        valid: (B, T) bool, False for padding; None means there is none. Only a recorder needs it.
    """

    memory: Memory
    top_k: int
    stop_layer: int | None = None
    recorder: Recorder | None = None
    valid: Tensor | None = None
    pairs: Pairs = field(default_factory=dict)

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        local_query, local_key, stored_key = call.local(query, key)
        self.pairs[call.layer_idx] = (stored_key, value)
        queries = searched_queries(self.memory, call.layer_idx, local_query, self.recorder)
        if call.layer_idx == self.stop_layer:
            raise StopForward
        outside = self.memory.layers[call.layer_idx].read(queries, self.top_k)
        on_weights = None
        if self.recorder is not None:
            on_weights = self.recorder.on_weights(self.memory, call.layer_idx, outside, self.valid)
        return attend(
            local_query,
            local_key,
            value,
            outside,
            scale=scale,
            softcap=softcap,
            gate=call.gate,
            dropout=call.dropout,
            on_weights=on_weights,
        )


@dataclass
class CollectPass(Pass):
    """Local attention only, pairs kept with their graph: embeds the previous windows of the ``paper`` layout.

    Args:
        stop_layer: Memory layer above which nothing is needed; None computes the whole forward.
    """

    replayable: ClassVar[bool] = True
    stop_layer: int | None = None
    pairs: Pairs = field(default_factory=dict)

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        local_query, local_key, shown_key = call.local(query, key)
        self.pairs[call.layer_idx] = (shown_key, value)
        if call.layer_idx == self.stop_layer:
            raise StopForward
        return attend(local_query, local_key, value, scale=scale, softcap=softcap, dropout=call.dropout)


@dataclass
class CrossbatchPass(Pass):
    """Trains: rows see windows of other rows in their memory layers.

    Args:
        table: For each row what it sees: rows of this batch, or entries of ``shown``.
        shown: Pairs of the previous windows by layer (``paper``); None shows this batch's own rows (``packed``).
        differentiable: Let gradients reach shown keys and values.
        gather: Shows the rows of all ranks; None those of this one.
    """

    replayable: ClassVar[bool] = True
    table: RowTable
    shown: Pairs | None = None
    differentiable: bool = True
    gather: RowGather | None = None

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        local_query, local_key, own_key = call.local(query, key)
        shown_key, shown_value = (own_key, value) if self.shown is None else self.shown[call.layer_idx]
        if self.gather is not None:
            shown_key, shown_value = self.gather(shown_key), self.gather(shown_value)
        output = crossbatch_attention(
            local_query,
            local_key,
            value,
            shown_key,
            shown_value,
            self.table,
            scale=scale,
            differentiable=self.differentiable,
            dropout=call.dropout,
            softcap=softcap,
            gate=call.gate,
        )
        if self.gather is not None and self.differentiable and not any(self.table):
            output = self.gather.keep(output, shown_key, shown_value)
        return output


def memory_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers' ``AttentionInterface``.

    Memory layers within a pass are served by the pass, all others by the function that the backbone used before.
    """
    call: LayerCall | None = kwargs.pop("fot_layer", None)
    if call is None:
        raise RuntimeError(
            f"{type(module).__name__} did not hand its keyword arguments to the attention interface, "
            "so lightning-fot cannot tell which layer it is"
        )
    if call.current is None or query.device.type == "meta":
        return call.backend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    call.sliding_window = kwargs.get("sliding_window")
    call.dropout = dropout
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scale *= call.score_factor
    output = call.current.attend(call, query, key, value, scale, kwargs.get("softcap"))
    return output.transpose(1, 2).contiguous(), None
