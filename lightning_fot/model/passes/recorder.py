"""Notes what memory layers search with and attend to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fot.memory.found import Found, Scoring
from lightning_fot.model.attention.whole import fold_heads

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.memory.passages import AttentionTrace
    from lightning_fot.model.passes.base import LayerCall


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
        self, memory: Memory, layer_idx: int, outside: Found | None, valid: Tensor | None
    ) -> Callable[[Tensor], None] | None:
        """What ``attend`` calls with the weights of ``outside``; None where nothing does.

        Args:
            memory: What is attended to.
            layer_idx: Layer.
            outside: Pairs of the memory.
            valid: (B, T) bool, False for queries of padding; None means that there is none.
        """
        if self.attention is None or outside is None:
            return None
        return partial(self.attention.add, layer_idx, rows=outside.rows, valid=valid, forgotten=memory.forgotten)

    def answering(self, answering: bool) -> None:
        """Says whether the queries that come choose the tokens of an answer."""
        if self.attention is not None:
            self.attention.answering = answering


def searched_queries(memory: Memory, layer_idx: int, query: Tensor, recorder: Recorder | None) -> Tensor:
    """Queries (B, H, T, D) in the form of a search, (B, G, R·T, D); the retriever and the recorder see them."""
    layer = memory.layers[layer_idx]
    folded = fold_heads(query, layer.kv_heads)
    seen = folded.detach().flatten(0, 1)
    layer.observe(folded.detach())
    if recorder is not None and recorder.queries is not None:
        recorder.queries.setdefault(layer_idx, []).append(seen.clone())
    return folded


def scoring(
    call: LayerCall, queries: Tensor, scale: float, softcap: float | None, recorder: Recorder | None
) -> Scoring:
    """How a call scores pairs for its queries (B, G, R·T, D), and what it wants of them."""
    pairs = call.dropout > 0 or (torch.is_grad_enabled() and queries.requires_grad)
    return Scoring(scale, softcap, recorder is not None and recorder.attention is not None, pairs)
