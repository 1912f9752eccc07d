"""What a transformers model is made of: its decoder, its attention layers, the functions they call, their modes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_fot.config.retriever import layer_spec
from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_fot.config.memory import MemoryConfig
    from lightning_fot.model.passes.base import AttentionFn, ExpandFn, Pass


# Kinds of layers, as configurations name them, whose attention sees all tokens.
_SEES_ALL = ("full_attention", "attention", "hybrid", None)
# … and whose attention sees the latest tokens, as many as ``sliding_window`` says.
_SLIDES = ("sliding_attention", "hybrid_sliding")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The stack of layers without the language-model head."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    if next(_attention_modules(decoder), None) is None:
        # Some heads are called decoders (ModernBERT's).
        decoder = model.base_model
    return decoder


def _attention_modules(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Attention modules that know the number of their layer."""
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            yield index, module


def rotary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules of the decoder that make rotary embeddings, by name."""
    named = decoder_of(model).named_modules()
    return {name: module for name, module in named if "RotaryEmbedding" in type(module).__name__}


def following_length(model: PreTrainedModel) -> list[nn.Module]:
    """Those rotary modules whose frequencies follow the length of what is read."""
    modules = rotary_modules(model).values()
    return [module for module in modules if getattr(module, "rope_type", None) in ("dynamic", "longrope")]


def forget_length(module: Any) -> None:
    """Puts a rotary module back to the frequencies of short texts: it keeps those of the longest that it has met."""
    if module.rope_type == "dynamic" and module.max_seq_len_cached > module.original_max_seq_len:
        module.register_buffer("inv_freq", module.original_inv_freq.to(module.inv_freq.device), persistent=False)
        module.max_seq_len_cached = module.original_max_seq_len


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model, in models that have others beside it too."""
    return model.config.get_text_config()


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules of the decoder by layer number.

    Raises:
        SettingError: There are none, or two share a number.
    """
    found: dict[int, nn.Module] = {}
    for index, module in _attention_modules(model):
        if index in found:
            raise SettingError(
                "model.backbone",
                type(model).__name__,
                f"has two attention modules numbered {index}",
                "Only decoder-only language models can have memory layers.",
            )
        found[index] = module
    if not found:
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            "has no numbered attention layers",
            "Give a decoder-only Llama-style model of transformers.",
        )
    return dict(sorted(found.items()))


def sees_all(model: PreTrainedModel, index: int) -> bool:
    """Whether a layer's attention sees all tokens, as the configuration names its kind."""
    types = getattr(text_config(model), "layer_types", None) or []
    return index >= len(types) or types[index] in _SEES_ALL


def slides(model: PreTrainedModel, index: int) -> bool:
    """Whether a layer's attention sees the latest tokens alone: a window that is no longer can have a memory."""
    types = getattr(text_config(model), "layer_types", None) or []
    return index < len(types) and types[index] in _SLIDES


def chosen_layers(
    model: PreTrainedModel, config: MemoryConfig, attentions: Mapping[int, nn.Module], count: int
) -> tuple[int, ...]:
    """Numbers of the memory layers; ``all`` are the layers of attention that see the whole text, or sliding windows.

    Where some see the whole text, those that slide are left as they are: their tokens look back a little way by design.

    Args:
        model: The backbone.
        config: Names them.
        attentions: Attention layers by number.
        count: Layers of the backbone.

    Raises:
        SettingError: One is not there or has no retriever where each has its own, or none can have a memory.
    """
    named = config.resolve_layers(count)
    if config.memory_layers != "all":
        return named
    found = tuple(index for index in named if index in attentions and sees_all(model, index))
    found = found or tuple(index for index in named if index in attentions and slides(model, index))
    if not found:
        raise SettingError(
            "model.memory.memory_layers",
            "all",
            f"finds none in {type(model).__name__}: its layers of attention see parts of the text",
            "Use a backbone with layers of full attention, or of sliding windows.",
        )
    for index in found:
        layer_spec(config.retriever, index)
    return found


def layer_count(model: PreTrainedModel, attentions: Mapping[int, nn.Module]) -> int:
    """Layers of the decoder, those without attention included."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    return max(count if isinstance(count, int) else 0, max(attentions) + 1)


def state_layers(model: PreTrainedModel, number: int) -> dict[int, Any]:
    """Fresh cache layers of transformers, by number, for layers that keep a state (Mamba, convolutions).

    A layer that has both a state and attention is among them.
    """
    from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

    try:
        layers = DynamicCache(config=text_config(model)).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        # Configurations that name layers in words that transformers' cache does not know have no states.
        return {}
    kept = enumerate(layers[:number])
    return {index: layer for index, layer in kept if isinstance(layer, LinearAttentionCacheLayerMixin)}


def expansion(layer: nn.Module) -> ExpandFn | None:
    """What makes keys and values of the latents that a layer keeps in a cache; None where it keeps these themselves.

    Multi-head latent attention (DeepSeek V2 and after) compresses keys and values of all heads into one vector a token,
    beside one rotated part of a key that all heads share.
    """
    expand: ExpandFn | None = getattr(layer, "expand_kv", None)
    return expand if callable(expand) and isinstance(getattr(layer, "kv_lora_rank", None), int) else None


def attention_function(implementation: str, layer: nn.Module) -> AttentionFn:
    """The attention function that transformers would choose for a layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
    function: AttentionFn = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module is in the mode it was in, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def checkpointing(model: nn.Module) -> list[Any]:
    """The functions that will run layers again in the backward pass (gradient checkpointing); empty when none will."""
    if not (model.training and torch.is_grad_enabled()):
        return []
    return [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]


def check_replay(current: Pass, functions: list[Any]) -> None:
    """Refuses gradient checkpointing where running a layer again would not give what the first run gave.

    Raises:
        SettingError: The pass changes something, or checkpointing is of the form that knows no graph.
    """
    if not current.replayable:
        problem = "reading beside a memory cannot be run again in the backward pass"
        fix = "Train on crossbatches, read under torch.no_grad() or in eval(), or turn checkpointing off."
    elif any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        problem = "its reentrant form gives the keys shown to other rows no gradient"
        fix = "Pass {'use_reentrant': False} when you turn it on."
    else:
        return
    raise SettingError("gradient_checkpointing", True, problem, fix)
