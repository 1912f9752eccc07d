"""The rival of a memory: the bare backbone with the keys and values of every layer for the whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from support.timing import Stamps
from torch import Tensor
from transformers import DynamicCache, StaticCache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

ROOM = 64  # tokens that a full cache can take beyond those it holds


def greedy(model: Any, ids: Tensor, tokens: int, stamps: Stamps, **options: Any) -> Stamps:
    """Continues (1, T) ids by exactly ``tokens`` tokens with ``model.generate``; the stamps tell when each came."""
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=stamps, **options)
    return stamps


class FullCache:
    """Keys and values of every layer for a text of a given length.

    ``dynamic`` is transformers' default, which copies all keys and values for each token; ``static`` writes in place:
    the stricter rival. Both are made over the same numbers. Dense attention takes the same time whatever they are, as
    long as pages are really there.

    Args:
        model: The bare backbone.
        tokens: Tokens in the cache.
    """

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        config = model.config.get_text_config()
        heads, dim = shape_of(config)
        noise = torch.randn(1, heads, 4096, dim, generator=torch.Generator().manual_seed(0)).to(model.dtype)
        self.buffers = [
            tuple(_repeated(noise, tokens + ROOM) for _ in range(2)) for _ in range(config.num_hidden_layers)
        ]

    @staticmethod
    def nbytes(model: PreTrainedModel, tokens: int) -> int:
        """Bytes of the keys and values of all layers."""
        config = model.config.get_text_config()
        heads, dim = shape_of(config)
        return int(2 * config.num_hidden_layers * heads * dim * tokens * model.dtype.itemsize)

    def dynamic(self) -> Cache:
        """A cache that grows by copying."""
        cache = DynamicCache(config=self.model.config)
        for made, (keys, values) in zip(cache.layers, self.buffers, strict=True):
            layer = cast(Any, made)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[:, :, : self.tokens], values[:, :, : self.tokens]
        return cache

    def static(self) -> Cache:
        """A cache that is written in place."""
        cache = StaticCache(self.model.config, max_cache_len=self.tokens + ROOM)
        for made, (keys, values) in zip(cache.layers, self.buffers, strict=True):
            layer = cast(Any, made)
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values = keys, values
            layer.cumulative_length.fill_(self.tokens)
        return cache

    def steps(self, kind: str, last_token: int, tokens: int) -> list[float]:
        """Seconds of each decoding step."""
        ids = torch.full((1, self.tokens + 1), last_token)
        cache = self.dynamic() if kind == "dynamic" else self.static()
        stamps = greedy(
            self.model, ids, tokens + 3, Stamps(), past_key_values=cache, attention_mask=torch.ones_like(ids)
        )
        return stamps.steps()


def shape_of(config: Any) -> tuple[int, int]:
    """KV heads and head size of a text configuration."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, dim


def _repeated(noise: Tensor, length: int) -> Tensor:
    """(1, G, length, D) filled with copies of the noise: real pages, made quickly."""
    filled = torch.empty(1, noise.shape[1], length, noise.shape[3], dtype=noise.dtype)
    for start in range(0, length, noise.shape[2]):
        part = filled[:, :, start : start + noise.shape[2]]
        part.copy_(noise[:, :, : part.shape[2]])
    return filled
