"""Tiny models as GGUF files of full precision, by the package that llama.cpp's converters use."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

WORDS = ("gemma", "gemma2", "gemma3")


def write_gguf(file: Path, model: PreTrainedModel, kind: str) -> None:
    """Writes a model's weights and settings, with a vocabulary of numbered words.

    Args:
        file: To be written.
        model: Of four layers in fp32.
        kind: What llama.cpp calls it: ``llama``, ``qwen2``, ``qwen3`` or ``gemma3``.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0) if kind != "gemma3" else 1e6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"word{number}" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if kind == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), config.num_hidden_layers
    )
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name.startswith("lm_head"):
            continue
        found = tensor.float()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = found.reshape(heads, 2, found.shape[0] // heads // 2, *found.shape[1:])
            found = halves.swapaxes(1, 2).reshape(found.shape)
        if kind in WORDS and "norm" in name:
            found = found + 1
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        writer.add_tensor(mapped, torch.as_tensor(found).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
