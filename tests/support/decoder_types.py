"""Tiny random models of every decoder type that the installed transformers knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 101
# Of every tiny model, here and in ``families``.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = {"is_decoder": True, "use_cache": True}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 12,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
# What some types need beside the sizes that all share.
_CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 16},
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 16},
    "olmo3": SLIDING,
    "cohere2": SLIDING,
    "cohere_compass_text": SLIDING,
    "dots1": {"n_shared_experts": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": None},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "exaone4": SLIDING,
    "gpt_oss": SLIDING,
    "qwen3_next": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "olmo_hybrid": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "num_dense_layers": 1},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "attention"], "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "phi": {"partial_rotary_factor": 0.5},
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "gemma4_text": {**SLIDING, "global_head_dim": 16, "num_kv_shared_layers": 0,
                    "hidden_size_per_layer_input": 0, "enable_moe_block": False},
    "deepseek_v3": LATENT,
    "deepseek_v2": LATENT,
    "axk1": LATENT,
    "kimi_linear": {**LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bailing_hybrid": {**LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "glm4_moe_lite": LATENT,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "longcat_flash": LATENT,
    "modernbert-decoder": {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"] * 2,
                           "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip


def decoder_types() -> list[str]:
    """Names of all model types that ``AutoModelForCausalLM`` opens."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model of 4 layers and width 64 in evaluation mode, its weights drawn so that attention is far from uniform."""
    kind = CONFIG_MAPPING[model_type]
    given = {**SIZES, **_DECODER, **_EXPERTS, **_CHANGES.get(model_type, {}), **changes}
    known = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    known |= set(getattr(kind, "__dataclass_fields__", {}))
    config = kind(**{name: value for name, value in given.items() if name in known})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(drawn * 0.2)
            elif "norm" in name:
                parameter.add_(drawn * 0.1)
            elif "sink" in name or "bias" in name or name.endswith("_b"):
                parameter.copy_(drawn * 0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
