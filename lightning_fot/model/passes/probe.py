"""What one forward of a few tokens tells of a model's attention layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fot.model.attention.rotary import Embeddings
from lightning_fot.model.passes.base import LayerCall, Pass


@dataclass
class LayerFacts:
    """What one probing forward tells of a memory layer."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotates: bool
    plain_at_zero: bool
    sliding_window: int | None
    scale: float
    """Factor on inner products, as the layer asks for it."""
    softcap: float | None
    asked: int = 1
    """Times in one forward that the layer asks for attention."""


class ProbePass(Pass):
    """Notes shapes, and whether a layer rotates: a cosine of NaN only reaches queries that are rotated."""

    serves_all_layers = True

    def __init__(self) -> None:
        self.facts: dict[int, LayerFacts] = {}

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        before = self.facts.get(call.layer_idx)
        self.facts[call.layer_idx] = LayerFacts(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=key.shape[3],
            value_dim=value.shape[3],
            rotates=bool(query.isnan().any()),
            plain_at_zero=_plain_at_zero(call.position_embeddings),
            sliding_window=call.sliding_window,
            scale=scale,
            softcap=softcap,
            asked=1 if before is None else before.asked + 1,
        )
        return torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)


def _plain_at_zero(embeddings: Embeddings | None) -> bool:
    """Whether position 0, the first of the embeddings, leaves keys as they are."""
    return embeddings is None or (bool((embeddings[0][:, :1] == 1).all()) and bool((embeddings[1][:, :1] == 0).all()))
