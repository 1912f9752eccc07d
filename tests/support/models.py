"""Tiny random Llamas, and settings that go with them."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_fot import MemoryConfig

VOCABULARY = 101
WINDOW = 16


def tiny_llama(kv_heads: int = 2, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """4 layers, width 64, 4 query heads of 16; init std 0.2, so that attention is far from uniform."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_sizes(kv_heads), **settings})).eval()


def tiny_qwen3(kv_heads: int = 2, seed: int = 0, **settings: Any) -> Qwen3ForCausalLM:
    """The same with norms on queries and keys, whose weights are not all 1."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**_sizes(kv_heads), **settings)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.uniform_(0.5, 1.5)
    return model


def _sizes(kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random ids."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def settings(**changes: Any) -> MemoryConfig:
    """Memory layers 1 and 3, window 16, more neighbours than any test stores."""
    return MemoryConfig(**{"memory_layers": [1, 3], "window": WINDOW, "top_k": 4096, **changes})
