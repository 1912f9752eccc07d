"""An independent Focused Transformer in fp64: plain loops over a Llama's weights, every formula written out.

Shares no code with the package. Slow, dense, and meant to be read beside the specification.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def rotated(vectors: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (half-split form) of (T, D) vectors at (T,) positions."""
    half = vectors.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None].double() * frequencies
    first, second = vectors[:, :half], vectors[:, half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * hidden / (hidden.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def dense_logits(
    model: LlamaForCausalLM,
    ids: Sequence[int],
    window: int | Sequence[int],
    memory_layers: Sequence[int],
    positions: str = "first",
    top_k: int | None = None,
    copies: int = 1,
) -> Tensor:
    """Logits (T, V) of one text, in one dense pass.

    A token sees, in every layer, the tokens of its own window up to itself at rotary positions that restart with the
    window; in memory layers also all keys of earlier windows, not rotated (``first``: as if at position 0), the
    ``top_k`` best of them if given. ``window`` is one length, or the length of each window; ``copies`` says how often
    each key of earlier windows is there.
    """
    config = model.config
    weights = {name: parameter.detach().double() for name, parameter in model.state_dict().items()}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.head_dim
    theta = config.rope_parameters["rope_theta"]
    places = torch.arange(len(ids))
    lengths = [window] * -(-len(ids) // window) if isinstance(window, int) else list(window)
    window_number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[: len(ids)]
    starts = torch.tensor([sum(lengths[:number]) for number in range(len(lengths))])
    local_place = places - starts[window_number]
    same_window = window_number[:, None] == window_number[None, :]
    earlier_window = window_number[:, None] > window_number[None, :]
    local = same_window & (places[:, None] >= places[None, :])
    hidden = weights["model.embed_tokens.weight"][torch.as_tensor(ids)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(hidden, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        query = (normed @ weights[prefix + "self_attn.q_proj.weight"].T).view(-1, heads, dim)
        key = (normed @ weights[prefix + "self_attn.k_proj.weight"].T).view(-1, kv_heads, dim)
        value = (normed @ weights[prefix + "self_attn.v_proj.weight"].T).view(-1, kv_heads, dim)
        is_memory_layer = layer in memory_layers
        outputs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            q, k, v = query[:, head], key[:, group], value[:, group]
            if is_memory_layer and positions == "none":
                q_local, k_local = q, k
            else:
                q_local, k_local = rotated(q, local_place, theta), rotated(k, local_place, theta)
            scores = (q_local @ k_local.T / math.sqrt(dim)).masked_fill(~local, -math.inf)
            if is_memory_layer:
                far = (q_local @ k.T / math.sqrt(dim)).masked_fill(~earlier_window, -math.inf)
                if top_k is not None and top_k < far.shape[1]:
                    best = far.topk(top_k, dim=1).indices
                    keep = torch.zeros_like(earlier_window).scatter_(1, best, True)
                    far = far.masked_fill(~keep, -math.inf)
                weight = torch.cat([scores, far + math.log(copies)], dim=1).softmax(dim=1)
                outputs.append(weight[:, : len(ids)] @ v + weight[:, len(ids) :] @ v)
            else:
                outputs.append(scores.softmax(dim=1) @ v)
        mixed = torch.cat(outputs, dim=1)
        hidden = hidden + mixed @ weights[prefix + "self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ weights[prefix + "mlp.gate_proj.weight"].T
        up = normed @ weights[prefix + "mlp.up_proj.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    hidden = rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps)
    return hidden @ weights["lm_head.weight"].T
