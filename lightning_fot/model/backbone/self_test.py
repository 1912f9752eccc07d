"""Whether a model can have memory layers: told when the memory is attached, with the reason where it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_fot.config.attending.base import SETTING
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.layers import following_length, text_config
from lightning_fot.model.passes.base import Pass
from lightning_fot.model.passes.crossbatch import CollectPass
from lightning_fot.model.passes.probe import LayerFacts
from lightning_fot.model.passes.way import WayOfAttending

if TYPE_CHECKING:
    from transformers import PreTrainedModel
# Largest difference of logits, relative to their spread, that still is rounding.
_PARITY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOKENS = 8


def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits (1, T, vocabulary) of a few fixed tokens."""
    ids = (torch.arange(_TOKENS) * 7 + 3) % text_config(model).vocab_size
    logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    if logits.shape[1] != _TOKENS:
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            f"gives logits of {logits.shape[1]} tokens for {_TOKENS}: it reads tokens of its own, which would be put "
            "before every window and into the memory",
            "Use a model, or adapters, without virtual tokens; LoRA is served.",
        )
    return logits


def refuse_virtual_tokens(model: PreTrainedModel) -> None:
    """Raises: SettingError: An adapter of peft puts tokens of its own before every text (prompt or prefix tuning)."""
    found = getattr(model, "active_peft_config", None)
    if getattr(found, "is_prompt_learning", False):
        raise SettingError(
            "model.backbone",
            str(getattr(found, "peft_type", type(found).__name__)).removeprefix("PeftType."),
            "puts virtual tokens before every window, and so into the memory",
            "Use adapters without virtual tokens; LoRA is served.",
        )


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Raises: SettingError: Weights are kept elsewhere between calls (accelerate), where no memory can know them."""
    away = [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]
    if away:
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            f"{len(away)} of its weights, such as {away[0]}, are offloaded to main memory or a disk (device_map), or "
            "not loaded",
            "Load all of it on one device, in bfloat16 if need be.",
        )


def calling(model: nn.Module, attentions: Mapping[int, nn.Module]) -> list[nn.Module]:
    """The attention layers and all modules that they are in, the model among them."""
    wanted = {id(layer) for layer in attentions.values()}
    return [module for module in model.modules() if any(id(part) in wanted for part in module.modules())]


def refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """Raises: SettingError: One of the modules that call attention layers is compiled, whenever that was done."""
    for module in modules:
        # What `torch.compile` gives has the module inside.
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise SettingError(
                "model",
                type(module._modules.get("_orig_mod", module)).__name__,
                "is compiled: a graph cannot follow what each call does beside it",
                "Leave compile out for the model and its layers; parts without attention may be compiled.",
            )


def refuse_lost_softcap(model: PreTrainedModel) -> None:
    """Raises: SettingError: The backbone's scores have a soft cap, which its attention function leaves out (Gemma 2).

    Transformers up to 5.18 does so without a word; later ones refuse the first forward.
    """
    config = text_config(model)
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            "has a soft cap on its attention scores, which the attention implementation sdpa leaves out",
            "Load it with attn_implementation='eager', or call model.set_attn_implementation('eager') before.",
        )


def plain_passes(way: WayOfAttending, device: torch.device) -> list[Pass]:
    """Passes under which the fixed tokens must get the plain backbone's logits.

    Args:
        way: That the model will attend by.
        device: Of the model.
    """
    return [CollectPass(), *way.plain_passes(_TOKENS, device)]


def refuse_other_logits(model: PreTrainedModel, reference: Tensor, logits: Tensor) -> None:
    """An attached model with an empty memory must be the backbone.

    Raises:
        SettingError: Its logits are others than rounding could make them.
    """
    spread = float(reference.float().std()) or 1.0
    difference = float((logits.float() - reference.float()).abs().max()) / spread
    tolerance = _PARITY_TOLERANCE.get(reference.dtype, 1e-4)
    if not difference <= tolerance:
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            f"with an empty memory its logits differ from the plain backbone's by {difference:.2g} of their spread "
            f"(rounding would leave {tolerance:.0e}): its attention does something that memory layers do not know",
            "Choose other memory layers, or report the model class to lightning-fot.",
        )


def refuse_sliding_layers(model: PreTrainedModel, memory_layers: tuple[int, ...]) -> None:
    """Raises: SettingError: A memory layer sees a sliding window by its configuration, and so no memory."""
    types = getattr(text_config(model), "layer_types", None) or []
    for index in memory_layers:
        sliding = index < len(types) and types[index] not in ("full_attention", None)
        if sliding:
            full = [number for number, kind in enumerate(types) if kind == "full_attention"]
            raise SettingError(
                "model.memory.memory_layers",
                list(memory_layers),
                f"layer {index} of this backbone has {types[index].replace('_', ' ')}, which sees no memory",
                f"Choose among its layers of full attention: {full}.",
            )


def refuse_following_positions(model: PreTrainedModel, way: WayOfAttending) -> None:
    """Raises: SettingError: The way needs positions whose frequencies do not follow the length, and these do."""
    if way.fixed_frequencies and following_length(model):
        raise SettingError(
            SETTING,
            way.settings.name,
            "cannot be had with positions whose frequencies change as a text goes on",
            "Choose another model.rope.type, or a backbone of fixed frequencies.",
        )


def refuse_silent_layers(facts: Mapping[int, LayerFacts], memory_layers: tuple[int, ...]) -> None:
    """Raises: SettingError: A memory layer was never asked for attention."""
    missing = [index for index in memory_layers if index not in facts]
    if missing:
        raise SettingError(
            "model.memory.memory_layers",
            list(memory_layers),
            f"layers {missing} were never asked for attention",
            "Choose layers with softmax attention.",
        )


def refuse_narrow_layers(facts: Mapping[int, LayerFacts], memory_layers: tuple[int, ...], window: int) -> None:
    """Raises: SettingError: A memory layer sees less of its local context than a window."""
    for index in memory_layers:
        seen = facts[index].sliding_window
        if seen is not None and seen < window:
            raise SettingError(
                "model.memory.window",
                window,
                f"layer {index} of this backbone sees {seen} tokens back, so that a part of each window would be "
                "in neither its local context nor its memory",
                f"Use a window of at most {seen}.",
            )


def unservable(model: PreTrainedModel, error: Exception) -> SettingError:
    """The error for a model whose forward fails with memory layers."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return SettingError(
        "model.backbone",
        type(model).__name__,
        f"its attention cannot be served ({type(error).__name__}: {reason})",
        "Memory layers need keys that are rotated as a whole after their projection, as in Llama.",
    )
