"""Reading beside a memory for any model of transformers that attends by its interface, query by query.

The plain model reads the whole text in one forward without a cache; its rotary function is kept from rotating, and an
attention function of our own then computes each token's row alone: local tokens at their places in the window when the
token was read, tokens of the memory at place 0. Shares no code with the package.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "dense_reading"
_ROTARY = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
_COMPLEX = "apply_rotary_emb"
Seen = Sequence[tuple[list[int], list[int]]]


class _Reading:
    """What the attention function is asked for; rotary functions leave what they were given here."""

    def __init__(self, seen: Seen, layers: Sequence[int], forgotten: bool, distance: int | None) -> None:
        self.seen, self.layers, self.forgotten, self.distance = seen, set(layers), forgotten, distance
        self.rotation: tuple[Any, Tensor, Tensor, int, bool] | None = None

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, more: dict[str, Any]
    ) -> Tensor:
        rotation, self.rotation = self.rotation, None
        if rotation is not None and hasattr(module, "kv_lora_rank"):
            # Multi-head latent attention rotates the end of a head: it is brought to the front.
            width = rotation[3]
            query, key = query.roll(width, -1), key.roll(width, -1)
        heads, groups = query.shape[1], key.shape[1]
        window, softcap, sinks = more.get("sliding_window"), more.get("softcap"), more.get("s_aux")
        rows = []
        for token, (local, memory) in enumerate(self.seen):
            places = torch.arange(len(local))
            first = 0 if window is None else max(0, len(local) - window)
            far = memory if module.layer_idx in self.layers else []
            q = _turn(query[:, :, token : token + 1], places[-1:], rotation)
            near_key = _turn(key[:, :, local], places, rotation)[:, :, first:]
            far_key, far_value = key[:, :, far], value[:, :, far]
            if self.forgotten:
                far_key, far_value = far_key.detach(), far_value.detach()
            zero = torch.zeros(len(far), dtype=torch.long)
            pairs = torch.cat([near_key, _turn(far_key, zero, rotation)], 2)
            if self.distance is not None and rotation is not None and len(far):
                # The difference of two places is what counts: one is as far back as it would be from place 0.
                behind = (len(local) - 1 - self.distance) * torch.ones_like(zero)
                back = torch.where(behind < 0, -1.0, 1.0)[None, :, None]
                function, cos, sin, width, single = rotation
                turned = (function, cos[:, behind.abs()], sin[:, behind.abs()] * back, width, single)
                pairs = torch.cat([near_key, _turn(far_key, torch.arange(len(far)), turned)], 2)
            values = torch.cat([value[:, :, local[first:]], far_value], 2)
            repeat = heads // groups
            scores = q @ pairs.repeat_interleave(repeat, 1).transpose(2, 3) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                column = sinks.reshape(1, -1, 1, 1).expand(len(scores), -1, 1, 1).to(scores)
                scores = torch.cat([scores, column], -1)
            weights = scores.softmax(-1)[..., : pairs.shape[2]]
            rows.append(weights @ values.repeat_interleave(repeat, 1))
        return torch.cat(rows, 2)


_NOW: list[_Reading] = []


def _turn(vectors: Tensor, places: Tensor, rotation: tuple[Any, Tensor, Tensor, int, bool] | None) -> Tensor:
    """(B, G, n, D) rotated to the places (n,)."""
    if rotation is None or not len(places):
        return vectors
    function, cos, sin, width, single = rotation
    part, rest = vectors[..., :width], vectors[..., width:]
    angles = cos[:, places], sin[:, places]
    turned = function(part, *angles) if single else function(part, part, *angles)[1]
    return torch.cat([turned, rest], -1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _NOW[-1].attend(module, query, key, value, scale, more).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _as_complex(query: Tensor, key: Tensor, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring dimensions of (B, H, n, D) as complex numbers, times those of (B, n, D / 2)."""
    angles = torch.complex(real, imaginary)[:, None]
    turned = (torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * angles for part in (query, key))
    first, second = (torch.view_as_real(part).flatten(-2) for part in turned)
    return first, second


def _kept_from_rotating(function: Any) -> Any:
    single = next(iter(inspect.signature(function).parameters)) == "x"

    def keep(first: Tensor, *given: Any, **named: Any) -> Any:
        key, rest = (first, given) if single else (given[0], given[1:])
        if rest[0].is_complex():
            _NOW[-1].rotation = _as_complex, rest[0].real, rest[0].imag, first.shape[-1], False
            return first, key
        cos, sin = rest[0], rest[1]
        _NOW[-1].rotation = function, cos, sin, first.shape[-1], single
        return first if single else (first, key)

    return keep


@contextmanager
def _unrotated(model: PreTrainedModel) -> Iterator[None]:
    files = {sys.modules[type(part).__module__] for part in model.modules() if "Attention" in type(part).__name__}
    functions = {(file, name): vars(file)[name] for file in files for name in _ROTARY if hasattr(file, name)}
    functions |= {
        (file, _COMPLEX): vars(file)[_COMPLEX]
        for file in files
        if "freqs_cis" in inspect.signature(vars(file).get(_COMPLEX, print)).parameters
    }
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        for (file, name), function in functions.items():
            vars(file)[name] = _kept_from_rotating(function)
        yield
    finally:
        for (file, name), function in functions.items():
            vars(file)[name] = function
        model.set_attn_implementation(before)


def dense_logits(
    model: PreTrainedModel,
    ids: Tensor,
    seen: Seen,
    layers: Sequence[int],
    forgotten: bool = False,
    distance: int | None = None,
) -> Tensor:
    """Logits (1, T, V) of ids (1, T): token t sees ``seen[t]``, local tokens, itself the last, and tokens in memory.

    Args:
        model: Without a memory attached.
        ids: The whole text.
        seen: As ``stride_oracle.Text`` lists it.
        layers: Memory layers.
        forgotten: Let no gradient reach pairs of the memory.
        distance: At which each token sees those; the text must have a token at each place in between.
    """
    named = {"position_ids": torch.tensor([[len(local) - 1 for local, _ in seen]])}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        named = {}
    _NOW.append(_Reading(seen, layers, forgotten, distance))
    try:
        with _unrotated(model):
            logits: Tensor = model(input_ids=ids, use_cache=False, **named).logits
        return logits
    finally:
        _NOW.pop()
