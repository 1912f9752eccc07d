"""An independent Focused Transformer in fp64 whose local window moves in strides: what each token sees is listed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.support.oracle import rms_norm, rotated


@dataclass
class Text:
    """A text read token by token by plain lists: for each token, what is local and what is in memory.

    Local tokens leave when the window is full and a token comes: all but the first ``sinks`` and the last ``overlap``.
    A token that came as one of the first ``skip`` of its window is never stored.
    """

    window: int
    overlap: int
    sinks: int = 0
    skip: int = 0
    local: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    unstored: set[int] = field(default_factory=set)
    seen: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def read(self, count: int) -> "Text":
        for _ in range(count):
            if len(self.local) == self.window:
                first_kept = max(self.sinks, self.window - self.overlap)
                self.leave(self.local[self.sinks : first_kept])
            if len(self.local) < self.skip:
                self.unstored.add(len(self.seen))
            self.local.append(len(self.seen))
            self.seen.append((list(self.local), list(self.memory)))
        return self

    def leave(self, tokens: list[int]) -> None:
        self.memory += [token for token in tokens if token not in self.unstored]
        self.local = [token for token in self.local if token not in tokens]

    def end(self) -> "Text":
        """The window is emptied into the memory."""
        self.leave(list(self.local))
        return self


def logits_of(
    model: LlamaForCausalLM,
    ids: Sequence[int],
    seen: Sequence[tuple[list[int], list[int]]],
    memory_layers: Sequence[int],
    positions: str = "first",
    distance: int | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Logits (T, V). Token t sees ``seen[t]``: local tokens, itself the last, and tokens in memory, without a limit.

    Under ``constant`` each query has keys of its own, rotated to ``distance`` places before it. With ``top_k`` the best
    of them for each KV head's query.
    """
    config = model.config
    weights = {name: parameter.detach().double() for name, parameter in model.state_dict().items()}
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    hidden = weights["model.embed_tokens.weight"][torch.as_tensor(ids)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(hidden, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        query = (normed @ weights[prefix + "self_attn.q_proj.weight"].T).view(-1, heads, dim)
        key = (normed @ weights[prefix + "self_attn.k_proj.weight"].T).view(-1, kv_heads, dim)
        value = (normed @ weights[prefix + "self_attn.v_proj.weight"].T).view(-1, kv_heads, dim)
        is_memory_layer = layer in memory_layers
        mixed = torch.zeros(len(ids), heads * dim, dtype=torch.float64)
        for token, (local, memory) in enumerate(seen):
            far = memory if is_memory_layer else []
            places = torch.arange(len(local))
            for head in range(heads):
                group = head // (heads // kv_heads)
                q, k = query[token : token + 1, head], key[local][:, group]
                far_key = key[far][:, group]
                if positions != "none" or not is_memory_layer:
                    q, k = rotated(q, places[-1:], theta), rotated(k, places, theta)
                if positions == "constant":
                    far_key = rotated(far_key, (places[-1] - distance).expand(len(far)), theta)
                if top_k is not None and top_k < len(far):
                    best = (far_key @ q[0]).topk(top_k).indices
                    far_key, chosen = far_key[best], [far[number] for number in best.tolist()]
                else:
                    chosen = far
                pairs = torch.cat([k, far_key])
                weight = (q @ pairs.T / math.sqrt(dim)).softmax(dim=1)
                found = weight @ value[local + chosen][:, group]
                mixed[token, head * dim : (head + 1) * dim] = found[0]
        hidden = hidden + mixed @ weights[prefix + "self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ weights[prefix + "mlp.gate_proj.weight"].T
        up = normed @ weights[prefix + "mlp.up_proj.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    hidden = rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps)
    return hidden @ weights["lm_head.weight"].T
