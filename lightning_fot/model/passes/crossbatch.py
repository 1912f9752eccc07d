"""Training on a crossbatch: rows see windows of other rows in their memory layers (FoT paper section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_fot.model.attention.crossbatch import RowTable, crossbatch_attention
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.passes.base import LayerCall, Pairs, Pass, StopForward

if TYPE_CHECKING:
    from lightning_fot.model.passes.gather import RowGather


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
        return attend(
            local_query, local_key, value, scale=scale, softcap=softcap, dropout=call.dropout, sinks=call.sinks
        )


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
            far_query=None if call.far is None else call.asking(query, local_query),
            scale=scale,
            differentiable=self.differentiable,
            dropout=call.dropout,
            sinks=call.sinks,
            softcap=softcap,
            gate=call.gate,
        )
        if self.gather is not None and self.differentiable and not any(self.table):
            output = self.gather.keep(output, shown_key, shown_value)
        return output
