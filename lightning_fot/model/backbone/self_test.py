"""Whether a model can have memory layers: told when the memory is attached, with the reason where it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_fot.config.attending.base import SETTING
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.layers import decoder_of, following_length, sees_all, slides, text_config
from lightning_fot.model.passes.base import Pass
from lightning_fot.model.passes.crossbatch import CollectPass
from lightning_fot.model.passes.probe import LayerFacts
from lightning_fot.model.passes.way import WayOfAttending

if TYPE_CHECKING:
    from transformers import PreTrainedModel
# Largest difference of logits, relative to their spread, that still is rounding.
_PARITY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOKENS = 8


def fixed_ids(model: PreTrainedModel, count: int = _TOKENS) -> Tensor:
    """(1, count) fixed tokens."""
    ids: Tensor = (torch.arange(count) * 7 + 3) % text_config(model).vocab_size
    return ids[None].to(model.device)


def difference_of(logits: Tensor, reference: Tensor) -> float:
    """The largest difference of two tensors (..., vocabulary), relative to the spread of the second."""
    spread = float(reference.float().std()) or 1.0
    return float((logits.float() - reference.float()).abs().max()) / spread


def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits (1, T, vocabulary) of a few fixed tokens."""
    logits: Tensor = model(input_ids=fixed_ids(model), use_cache=False).logits
    if logits.shape[1] != _TOKENS:
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            f"gives logits of {logits.shape[1]} tokens for {_TOKENS}: it reads tokens of its own, which would be put "
            "before every window and into the memory",
            "Use a model, or adapters, without virtual tokens; LoRA is served.",
        )
    return logits


def goes_on_in_parts(model: PreTrainedModel, reference: Tensor) -> bool:
    """Whether the plain backbone reads on with several tokens at once as it reads them in one forward."""
    from transformers.cache_utils import DynamicCache

    ids = fixed_ids(model)
    cache = DynamicCache(config=text_config(model))
    half = _TOKENS // 2
    model(input_ids=ids[:, :half], past_key_values=cache, use_cache=True)
    rest: Tensor = model(input_ids=ids[:, half:], past_key_values=cache, use_cache=True).logits
    return difference_of(rest, reference[:, half:]) <= 0.1


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
    difference = difference_of(logits, reference)
    tolerance = _PARITY_TOLERANCE.get(reference.dtype, 1e-4)
    if not difference <= tolerance:
        raise SettingError(
            "model.backbone",
            type(model).__name__,
            f"with an empty memory its logits differ from the plain backbone's by {difference:.2g} of their spread "
            f"(rounding would leave {tolerance:.0e}): its attention does something that memory layers do not know",
            "Choose other memory layers, or report the model class to lightning-fot.",
        )


def refuse_layers_without_attention(
    memory_layers: tuple[int, ...], attentions: Mapping[int, nn.Module], count: int
) -> None:
    """Raises: SettingError: A memory layer is a layer of another kind (Mamba, convolution, feed-forward)."""
    for index in memory_layers:
        if index not in attentions:
            raise SettingError(
                "model.memory.memory_layers",
                list(memory_layers),
                f"layer {index} of the backbone's {count} has no softmax attention",
                f"Choose among its layers of attention: {list(attentions)}.",
            )


def refuse_partial_layers(model: PreTrainedModel, memory_layers: tuple[int, ...]) -> None:
    """Raises: SettingError: A memory layer sees chunks or other parts of the text, and so no memory.

    Layers with a sliding window see all of a memory's window where that is no longer: see refuse_narrow_layers.
    """
    types = getattr(text_config(model), "layer_types", None) or []
    for index in memory_layers:
        if not (sees_all(model, index) or slides(model, index)):
            full = [number for number in range(len(types)) if sees_all(model, number) or slides(model, number)]
            raise SettingError(
                "model.memory.memory_layers",
                list(memory_layers),
                f"layer {index} of this backbone has {types[index].replace('_', ' ')}, which sees no memory",
                f"Choose among its layers of full attention or sliding windows: {full}.",
            )


def refuse_short_chunks(model: PreTrainedModel, window: int) -> None:
    """Raises: SettingError: Layers see chunks of the text that are shorter than a window (Llama 4)."""
    settings = text_config(model)
    chunk = getattr(settings, "attention_chunk_size", None)
    if "chunked_attention" in (getattr(settings, "layer_types", None) or []) and chunk and chunk < window:
        raise SettingError(
            "model.memory.window",
            window,
            f"layers of this backbone see chunks of {chunk} tokens, which would begin in the midst of windows",
            f"Use a window of at most {chunk}.",
        )


def refuse_shared_layers(model: PreTrainedModel, memory_layers: tuple[int, ...]) -> None:
    """Raises: SettingError: A memory layer gives its keys to other layers, or has those of another (Gemma 3n and 4)."""
    modes = getattr(text_config(model), "kv_sharing_modes", None) or []
    for index in memory_layers:
        if index < len(modes) and modes[index] in ("reuse", "store"):
            own = [number for number, mode in enumerate(modes) if mode not in ("reuse", "store")]
            raise SettingError(
                "model.memory.memory_layers",
                list(memory_layers),
                f"layer {index} of this backbone shares its keys and values with other layers, which have no memory",
                f"Choose among layers that keep theirs: {own}.",
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


def refuse_constant_positions(
    model: PreTrainedModel, facts: Mapping[int, LayerFacts], memory_layers: tuple[int, ...], distance: int
) -> None:
    """Refuses memory keys at a constant distance where the model has no rotation by that distance.

    Raises:
        SettingError: No memory layer rotates (learned positions), or frequencies would change at that distance.
    """
    if not any(facts[index].rotates for index in memory_layers):
        raise SettingError(
            "model.memory.positions",
            "constant",
            f"{type(model).__name__} does not rotate queries and keys, so that distances are nothing it could set",
            "Set positions=first.",
        )
    for module in following_length(model):
        known = _length_before_change(model, module)
        if distance >= known:
            raise SettingError(
                "model.memory.distance",
                distance,
                f"is beyond {known} tokens, where this backbone's rotary frequencies change for its local window too",
                f"Use a distance below {known}.",
            )


def _length_before_change(model: PreTrainedModel, module: Any) -> int:
    """Tokens up to which a rotary module whose frequencies follow the length has those of short texts."""
    settings = getattr(text_config(model), "rope_parameters", None) or {}
    return int(settings.get("original_max_position_embeddings") or module.original_max_seq_len)


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


@contextmanager
def learned_positions(model: PreTrainedModel) -> Iterator[list[int]]:
    """Notes how many positions a forward of the fixed tokens can learn of.

    Yields:
        A list that gets, for each table of learned positions, how many it has.
    """
    rooms: list[int] = []

    def look(table: Any, args: tuple[Any, ...]) -> None:
        ids = args[0].reshape(-1)
        if len(ids) == _TOKENS and bool((ids - ids[0] == torch.arange(_TOKENS, device=ids.device)).all()):
            rooms.append(table.num_embeddings - int(ids[0]))

    words = model.get_input_embeddings()
    tables = [part for part in decoder_of(model).modules() if isinstance(part, nn.Embedding) and part is not words]
    handles = [table.register_forward_pre_hook(look) for table in tables]
    try:
        yield rooms
    finally:
        for handle in handles:
            handle.remove()


def refuse_short_tables(rooms: list[int], window: int) -> None:
    """Raises: SettingError: A window is longer than a table of learned positions."""
    if rooms and min(rooms) < window:
        raise SettingError(
            "model.memory.window",
            window,
            f"this backbone has learned {min(rooms)} positions, and none beyond",
            f"Use a window of at most {min(rooms)}.",
        )


def refuse_layers_that_ask_twice(facts: Mapping[int, LayerFacts], memory_layers: tuple[int, ...]) -> None:
    """Raises: SettingError: A memory layer asks for attention more than once in each forward."""
    for index in memory_layers:
        if facts[index].asked > 1:
            raise SettingError(
                "model.memory.memory_layers",
                list(memory_layers),
                f"layer {index} of this backbone asks for attention {facts[index].asked} times in each forward, so "
                "that its keys have no one value that a memory could store",
                "Choose layers that ask once, or another backbone.",
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
