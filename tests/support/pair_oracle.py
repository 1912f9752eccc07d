"""A Llama in fp64 whose attention is written out pair by pair: the oracle of the comparison modes.

Shares no code with the package. ``score`` says what a query and a key are to each other, ``log_counts`` who sees whom.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.support.oracle import rms_norm


def turned(vectors: Tensor, positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """(..., D) vectors rotated (half-split form) to positions (...) by frequencies (D/2,), and scaled."""
    half = vectors.shape[-1] // 2
    angles = positions[..., None].double() * frequencies
    first, second = vectors[..., :half], vectors[..., half:]
    pairs = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return scale * torch.cat(pairs, dim=-1)


def plain_frequencies(model: LlamaForCausalLM) -> Tensor:
    """Theta^(-2i/D), (D/2,)."""
    half = model.config.head_dim // 2
    theta = float(model.config.rope_parameters["rope_theta"])
    return theta ** (-torch.arange(half, dtype=torch.float64) / half)


def rotary_score(frequencies: Tensor, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores of rotary attention at true distances."""

    def score(query: Tensor, key: Tensor) -> Tensor:
        places = torch.arange(len(query))
        return turned(query, places, frequencies, scale) @ turned(key, places, frequencies, scale).T

    return score


def causal(length: int) -> Tensor:
    """Log counts (T, T) of plain causality."""
    return torch.zeros(length, length, dtype=torch.float64).masked_fill_(
        torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf
    )


def pair_logits(
    model: LlamaForCausalLM,
    ids: Sequence[int],
    score: Callable[[Tensor, Tensor], Tensor],
    log_counts: Tensor | dict[int, Tensor],
) -> Tensor:
    """Logits (T, V) of one text.

    ``score`` takes queries and keys (T, D) of a head, not rotated, and gives their products (T, T); ``log_counts``
    (T, T), or (H, T, T) where heads differ, has the logarithm of how often query i sees key j, for all layers or by
    layer.
    """
    config = model.config
    weights = {name: parameter.detach().double() for name, parameter in model.state_dict().items()}
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden = weights["model.embed_tokens.weight"][torch.as_tensor(ids)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        counts = log_counts[layer] if isinstance(log_counts, dict) else log_counts
        normed = rms_norm(hidden, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        query = (normed @ weights[prefix + "self_attn.q_proj.weight"].T).view(-1, heads, dim)
        key = (normed @ weights[prefix + "self_attn.k_proj.weight"].T).view(-1, kv_heads, dim)
        value = (normed @ weights[prefix + "self_attn.v_proj.weight"].T).view(-1, kv_heads, dim)
        outputs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            products = score(query[:, head], key[:, group]) / math.sqrt(dim)
            own = counts[head] if counts.dim() == 3 else counts
            outputs.append((products + own).softmax(dim=1) @ value[:, group])
        hidden = hidden + torch.cat(outputs, dim=1) @ weights[prefix + "self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ weights[prefix + "mlp.gate_proj.weight"].T
        up = normed @ weights[prefix + "mlp.up_proj.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    return rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T
