"""What a memory layer does during one call of the model: read a window beside a memory, or train a crossbatch.

A pass is made for each call and holds everything that the call adds, so that an interrupted call changes no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lightning_fot.model.attention.rotary import RotaryFn, at_position_zero, rotate

if TYPE_CHECKING:
    pass

Pairs = dict[int, tuple[Tensor, Tensor]]
AttentionFn = Callable[..., tuple[Tensor, Tensor | None]]
# Latents (B, 1, S, C) and (B, 1, S, R) to keys (B, H, S, D) and values (B, H, S, E).
ExpandFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
        far: (cos, sin), each (B or 1, 1, R), of the one place that queries ask the memory from; None where they ask
            from their own.
        dropout: Share of attention weights that the backbone drops, 0 outside training.
        sinks: (H,) scores of a column without a value in each softmax, None without.
        expand: Makes keys and values of the latents that the layer keeps in a cache; None where it keeps these.
        plain: The backbone's own attention for other queries, keys, values and an additive mask; its output is
            (B, T, H, D).
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
    far: tuple[Tensor, Tensor] | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None
    expand: ExpandFn | None = None
    plain: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None

    def local(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, L, D), rotated keys, and the keys as if at position 0, both (B, G, S, D); L <= S."""
        if self.rotary is None or self.position_embeddings is None:
            return query, key, key
        rotated_query, rotated_key = rotate(self.rotary, query, key, self.position_embeddings)
        return rotated_query, rotated_key, self.to_position_zero(key)

    def asking(self, query: Tensor, local_query: Tensor) -> Tensor:
        """Queries as they ask the memory, whose keys are as if at position 0.

        Args:
            query: (B, H, L, D), not rotated.
            local_query: The same, rotated to their own places.
        """
        if self.far is None or self.rotary is None:
            return local_query
        cos, sin = (half.expand(-1, query.shape[2], -1) for half in self.far)
        return self.rotary(query, query[:, :1], cos, sin)[0]

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
    places: Tensor | None = None
    """(1, T) int64: what the decoder is told in place of counting from 0; None leaves it."""
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


class TextPass(Pass):
    """A pass of texts that go on: it travels as ``past_key_values``, and rules each forward that it is given to."""

    serves_all_layers = True
    named: Tensor | None = None
    """(B, L) ids of the forward in progress, where the decoder is given their embeddings."""

    @abstractmethod
    def begin(self, ids: Tensor, valid: Tensor | None = None) -> None:
        """Before a forward over (B, L) ids; ``valid`` is False or 0 for padding, None without."""

    @abstractmethod
    def end(self, completed: bool) -> None:
        """After it; one that failed is taken back."""


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
    call.plain = partial(call.backend, module, scaling=scaling, dropout=dropout, **kwargs)
    call.sliding_window = kwargs.get("sliding_window")
    call.dropout, call.sinks = dropout, kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scale *= call.score_factor
    output = call.current.attend(call, query, key, value, scale, kwargs.get("softcap"))
    return output.transpose(1, 2).contiguous(), None
