"""Rotary positions of memory layers: queries and keys rotated locally, memory keys as if at position 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn

RotaryFn = Callable[..., tuple[Tensor, Tensor]]
# (cos, sin), each (B or 1, T, R) with R at most the head size.
Embeddings = tuple[Tensor, Tensor]


def find_rotary(attention: nn.Module) -> RotaryFn | None:
    """The ``apply_rotary_pos_emb`` of the module file that defines an attention class.

    None where there is none, or the layer is never given what to rotate by: some files have a function that their
    attention does not use (Jamba's).
    """
    given = "position_embeddings" in signature(attention.forward).parameters
    if hasattr(attention, "expand_kv"):
        return turn_last if given else None
    function: RotaryFn | None = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if not callable(function) or not (given or any("Rotary" in type(part).__name__ for part in attention.modules())):
        return None
    return function


def turn_last(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the last R of D dimensions, as multi-head latent attention does.

    Files that keep rotated dimensions in pairs bring them in the order of halves, also where nothing is rotated.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D).
        cos: (B or 1, T, R).
        sin: (B or 1, T, R).
    """
    width = cos.shape[-1]

    def turned(heads: Tensor) -> Tensor:
        plain, part = heads[..., :-width], heads[..., -width:]
        half = torch.cat([-part[..., width // 2 :], part[..., : width // 2]], -1)
        return torch.cat([plain, part * cos[:, None] + half * sin[:, None]], -1)

    return turned(query), turned(key)


def turn_pairs(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the last 2R of D dimensions, two neighbours together: a complex number each (DeepSeek V2, Llama 4).

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D).
        cos: (B or 1, T, R), real parts.
        sin: (B or 1, T, R), imaginary parts.
    """
    width = 2 * cos.shape[-1]

    def turned(heads: Tensor) -> Tensor:
        plain, part = heads[..., :-width], heads[..., -width:].float()
        real, imaginary = part[..., 0::2], part[..., 1::2]
        left, right = cos[:, None], sin[:, None]
        both = torch.stack([real * left - imaginary * right, real * right + imaginary * left], -1)
        return torch.cat([plain, both.flatten(-2).to(heads.dtype)], -1)

    return turned(query), turned(key)


def fitted(function: RotaryFn, head_dim: int, width: int) -> RotaryFn:
    """A rotary function in the form of Llama's, ``(query, key, cos, sin)`` of whole heads.

    Args:
        function: A module file's own: it may rotate one tensor at a time (Gemma 4), or know only the part of a head
            that its attention cuts out beforehand (Phi, StableLM).
        head_dim: D.
        width: R, the last size of cos and sin.
    """
    if next(iter(signature(function).parameters)) == "x":
        single: Callable[..., Tensor] = function  # type: ignore[assignment]

        def both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return single(query, cos, sin), single(key, cos, sin)

        return fitted(both, head_dim, width)
    head, angles = torch.zeros(1, 1, 1, head_dim), torch.zeros(1, 1, width)
    try:
        function(head, head, angles, angles)
    except RuntimeError:

        def partly(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            turned = function(query[..., :width], key[..., :width], cos, sin)
            return torch.cat([turned[0], query[..., width:]], -1), torch.cat([turned[1], key[..., width:]], -1)

        return partly
    return function


def identity_rotary(position_embeddings: Embeddings) -> Embeddings:
    """(cos, sin) that rotate nothing, in the shape and dtype of the real ones.

    Passed to a memory layer in place of the real ones, they let queries and keys reach the attention function after
    biases, norms and fused projections, yet before rotation.
    """
    cos, sin = position_embeddings
    return torch.ones_like(cos), torch.zeros_like(sin)


def rotate(rotary: RotaryFn, query: Tensor, key: Tensor, position_embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """Rotates queries (B, H, L, D) and keys (B, G, S, D) by (cos, sin), each (B or 1, S, R) with R <= D.

    The queries are those of the last L <= S keys.
    """
    cos, sin = position_embeddings
    new, width = query.shape[2], key.shape[2]
    if new == width:
        return rotary(query, key, cos, sin)
    # The functions rotate two tensors at a time: one head stands in for the one that is not needed.
    rotated_query, _ = rotary(query, query[:, :1], cos[:, width - new :], sin[:, width - new :])
    return rotated_query, rotary(key[:, :1], key, cos, sin)[1]


def unrotate(rotary: RotaryFn, key: Tensor, position_embeddings: Embeddings) -> Tensor:
    """Takes the rotation by (cos, sin), each (B or 1, S, R), off keys (B, G, S, D); float32.

    cos and sin may be scaled (YaRN, longrope): the inverse of scale · rotation by an angle is that by its negative,
    over the scale.
    """
    cos, sin = (part.float() for part in position_embeddings)
    squared = cos.square() + sin.square()
    plain = key.float()
    return rotary(plain[:, :1], plain, cos / squared, -sin / squared)[1]


def at_position_zero(rotary: RotaryFn, key: Tensor, zero_embeddings: Embeddings) -> Tensor:
    """Keys as if at position 0, through the backbone's own rotary function.

    The identity for plain rotary embeddings; a scale for variants that scale cos and sin (YaRN, longrope).

    Args:
        rotary: The backbone's ``apply_rotary_pos_emb``.
        key: (B, G, T, D), not rotated.
        zero_embeddings: (cos, sin) at position 0, each (1, 1, R).
    """
    cos, sin = zero_embeddings
    shape = (key.shape[0], key.shape[2], cos.shape[-1])
    return rotary(key[:, :1], key, cos.to(key).expand(shape), sin.to(key).expand(shape))[1]
