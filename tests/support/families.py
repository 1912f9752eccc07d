"""Tiny random models of many families and rotary variants."""

import torch
import transformers

from tests.support import decoder_types

SIZES = decoder_types.SIZES | {
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FULL = {"layer_types": ["full_attention"] * 4}


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **more}}


FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    # Up to transformers 5.18 its sdpa leaves the soft cap out.
    "Gemma2": {**FULL, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "Gemma3": {
        **decoder_types.SLIDING,
        "query_pre_attn_scalar": 16,
    },
    "GPTNeoX": {},
    "Olmo3": FULL,
    "Olmo2": {},
    "SmolLM3": {"no_rope_layers": [1, 0, 1, 1]},
    "Granite": {},
    "Starcoder2": {"sliding_window": None},
    "Cohere": {},
    "Glm4": {"partial_rotary_factor": 0.5},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
}


LATENT = decoder_types.LATENT | {"first_k_dense_replace": 4}
# Rotary variants on Llama, and partial rotation on Phi-3.
VARIANTS = {
    "linear": ("Llama", rope("linear")),
    "dynamic": ("Llama", rope("dynamic")),
    "yarn": ("Llama", rope("yarn", original_max_position_embeddings=128)),
    "llama3": (
        "Llama",
        rope("llama3", original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "partial": ("Phi3", {"partial_rotary_factor": 0.5}),
}
CASES = {name: (name, changes) for name, changes in FAMILIES.items()} | VARIANTS


def family(name, changes):
    torch.manual_seed(0)
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**SIZES | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()
