"""Reading one window beside a memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.passes.base import LayerCall, Pairs, Pass, StopForward
from lightning_fot.model.passes.recorder import Recorder, scoring, searched_queries

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory


@dataclass
class WindowPass(Pass):
    """Reads one window: it attends to the memory, and its pairs wait in ``pairs`` until the whole window is read.

    Args:
        memory: What is attended to; not changed by the pass.
        top_k: Pairs retrieved for each query.
        dense_pairs: Pairs of a memory up to which all are attended to.
        stop_layer: Memory layer above which nothing is needed; None computes the whole forward.
        recorder: Notes what is searched and attended to; None notes nothing.
        valid: (B, T) bool, False for padding; None means there is none. Only a recorder needs it.
    """

    memory: Memory
    top_k: int
    dense_pairs: int = 0
    stop_layer: int | None = None
    recorder: Recorder | None = None
    valid: Tensor | None = None
    pairs: Pairs = field(default_factory=dict)

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        local_query, local_key, stored_key = call.local(query, key)
        self.pairs[call.layer_idx] = (stored_key, value)
        far_query = call.asking(query, local_query)
        queries = searched_queries(self.memory, call.layer_idx, far_query, self.recorder)
        if call.layer_idx == self.stop_layer:
            raise StopForward
        asked = scoring(call, queries, scale, softcap, self.recorder)
        outside = self.memory.layers[call.layer_idx].read(queries, self.top_k, self.dense_pairs, asked)
        on_weights = None
        if self.recorder is not None:
            on_weights = self.recorder.on_weights(self.memory, call.layer_idx, outside, self.valid)
        return attend(
            local_query,
            local_key,
            value,
            outside,
            far_query=far_query,
            scale=scale,
            softcap=softcap,
            gate=call.gate,
            dropout=call.dropout,
            sinks=call.sinks,
            on_weights=on_weights,
        )
