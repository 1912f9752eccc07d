"""Attaching memory layers to a Hugging Face model through its public attention interface, and detaching them again.

No forward is patched and no parameter is renamed. A hook on each attention layer passes memory layers an identity
rotation, so that queries and keys reach the attention function after biases and norms, yet not rotated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_fot.config import MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.passes import AttentionFn, CollectPass, LayerCall, Pass, StopForward, memory_attention_forward
from lightning_fot.positions import find_rotary, identity_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_fot.lm import MemoryLM

INTERFACE = "lightning_fot"
# Largest difference of logits, relative to their spread, that still is rounding.
_PARITY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_SELF_TEST_TOKENS = 8


@dataclass
class LayerFacts:
    """What one probing forward tells of a memory layer."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotates: bool


class _ProbePass(Pass):
    """Notes shapes, and whether a layer rotates: a cosine of NaN only reaches queries that are rotated."""

    serves_all_layers = True

    def __init__(self) -> None:
        self.facts: dict[int, LayerFacts] = {}

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        self.facts[call.layer_idx] = LayerFacts(
            query.shape[1], key.shape[1], key.shape[3], value.shape[3], bool(query.isnan().any())
        )
        return torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)


class Attachment:
    """The hooks that turn chosen attention layers of a model into memory layers.

    Args:
        model: A causal language model of transformers that uses its ``AttentionInterface``.
        config: Which layers, and how they read.

    Raises:
        SettingError: The model or one of the layers cannot be served; the message says why, and the model is as before.
    """

    def __init__(self, model: PreTrainedModel, config: MemoryConfig) -> None:
        self.model = model
        self.attentions = _attention_layers(model)
        self.memory_layers = config.resolve_layers(len(self.attentions))
        self._positions = config.positions
        self._current: Pass | None = None
        self._probing = False
        self.facts: dict[int, LayerFacts] = {}
        self.gates: dict[int, nn.Parameter] = {}
        self._refuse_sliding_layers()
        self._original = _implementation(model)
        self._backends = {index: _backend(self._original, layer) for index, layer in self.attentions.items()}
        self._handles = [
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer in self.attentions.items()
        ]
        self._handles += self._cache_hooks()
        try:
            reference = self._logits()
            self._select_interface()
            self._probe()
            self._check_parity(reference)
        except BaseException as error:
            self.detach()
            if isinstance(error, SettingError) or not isinstance(error, Exception):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise SettingError(
                "model.backbone",
                type(model).__name__,
                f"its attention cannot be served ({type(error).__name__}: {reason})",
                "Memory layers need keys that are rotated as a whole after their projection, as in Llama.",
            ) from error

    def detach(self) -> None:
        """Takes the hooks away; the model computes what it computed before, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if _implementation(self.model) != self._original:
            self.model.set_attn_implementation(self._original)

    @contextmanager
    def during(self, current: Pass) -> Iterator[None]:
        """Memory layers serve ``current`` inside the block; a forward that it stops early ends quietly."""
        if not self._handles:
            raise RuntimeError("the memory is detached from this model: attach it again")
        outer, self._current = self._current, current
        try:
            yield
        except StopForward:
            pass
        finally:
            self._current = outer

    def _hook(self, index: int) -> Any:
        rotary = find_rotary(self.attentions[index])
        is_memory_layer = index in self.memory_layers

        def before_attention(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Without our interface the call would reach a foreign attention function as an unknown argument.
            if _implementation(self.model) != INTERFACE:
                return None
            call = LayerCall(index, self._backends[index], is_memory_layer=is_memory_layer)
            kwargs = {**kwargs, "fot_layer": call}
            current = self._current
            if current is None or not (is_memory_layer or current.serves_all_layers):
                return args, kwargs
            call.current = current
            call.gate = self.gates.get(index)
            embeddings = kwargs.get("position_embeddings")
            if embeddings is None and rotary is not None and is_memory_layer:
                raise SettingError(
                    "model.backbone",
                    type(self.model).__name__,
                    f"layer {index} is not given its rotary embeddings by name",
                    "This model class cannot have memory layers yet.",
                )
            if embeddings is not None:
                if self._probing:
                    replacement = tuple(torch.full_like(part, torch.nan) for part in embeddings)
                else:
                    length = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
                    replacement = identity_rotary(tuple(part[:, -length:] for part in embeddings))
                kwargs["position_embeddings"] = replacement
                rotates = not self._probing and self.facts[index].rotates
                # positions="none" concerns memory layers alone.
                if rotates and (self._positions == "first" or not is_memory_layer):
                    call.position_embeddings, call.rotary = embeddings, rotary
            return args, kwargs

        return before_attention

    def _cache_hooks(self) -> list[Any]:
        """Hooks that let a :class:`MemoryCache` given as ``past_key_values`` rule the forward it is given to."""
        from lightning_fot.cache import MemoryCache

        decoder = decoder_of(self.model)
        outer: list[Pass | None] = []

        def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, MemoryCache):
                return
            inputs = args[0] if args else kwargs.get("input_ids")
            rows, length = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[:2]
            mask = kwargs.get("attention_mask")
            valid = torch.ones(rows, length) if mask is None else mask[:, -length:]
            cache.begin(valid.bool())
            outer.append(self._current)
            self._current = cache

        def after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(kwargs.get("past_key_values"), MemoryCache) and outer:
                kwargs["past_key_values"].end(completed=output is not None)
                self._current = outer.pop()

        def local_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not isinstance(self._current, MemoryCache):
                return None
            if "position_ids" in kwargs:
                return args, {**kwargs, "position_ids": self._current.positions}
            return (args[0], self._current.positions, *args[2:]), kwargs

        return [
            decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
            decoder.register_forward_hook(after_decoder, with_kwargs=True, always_call=True),
            *(
                module.register_forward_pre_hook(local_positions, with_kwargs=True)
                for module in decoder.modules()
                if "RotaryEmbedding" in type(module).__name__
            ),
        ]

    def _refuse_sliding_layers(self) -> None:
        types = getattr(_text_config(self.model), "layer_types", None) or []
        for index in self.memory_layers:
            sliding = index < len(types) and types[index] not in ("full_attention", None)
            if sliding:
                full = [number for number, kind in enumerate(types) if kind == "full_attention"]
                raise SettingError(
                    "model.memory.memory_layers",
                    list(self.memory_layers),
                    f"layer {index} of this backbone has {types[index].replace('_', ' ')}, which sees no memory",
                    f"Choose among its layers of full attention: {full}.",
                )

    def _select_interface(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask, sdpa_mask

        AttentionInterface.register(INTERFACE, memory_attention_forward)
        AttentionMaskInterface.register(INTERFACE, eager_mask if self._original == "eager" else sdpa_mask)
        self.model.set_attn_implementation(INTERFACE)
        if _implementation(self.model) != INTERFACE:
            raise SettingError(
                "model.backbone",
                type(self.model).__name__,
                "does not take its attention from transformers' AttentionInterface",
                "Use a model class that supports it (most of transformers 5 do).",
            )

    def _probe(self) -> None:
        probe = _ProbePass()
        self._probing = True
        try:
            with self.during(probe):
                self._logits()
        finally:
            self._probing = False
        missing = [index for index in self.memory_layers if index not in probe.facts]
        if missing:
            raise SettingError(
                "model.memory.memory_layers",
                list(self.memory_layers),
                f"layers {missing} were never asked for attention",
                "Choose layers with softmax attention.",
            )
        self.facts = probe.facts

    def _check_parity(self, reference: Tensor) -> None:
        """An attached model with an empty memory must be the backbone (checked with the backbone's own positions)."""
        positions, self._positions = self._positions, "first"
        try:
            with self.during(CollectPass()):
                logits = self._logits()
        finally:
            self._positions = positions
        spread = float(reference.float().std()) or 1.0
        difference = float((logits.float() - reference.float()).abs().max()) / spread
        tolerance = _PARITY_TOLERANCE.get(reference.dtype, 1e-4)
        if not difference <= tolerance:
            raise SettingError(
                "model.backbone",
                type(self.model).__name__,
                f"with an empty memory its logits differ from the plain backbone's by {difference:.2g} of their spread "
                f"(rounding would leave {tolerance:.0e}): its attention does something that memory layers do not know",
                "Choose other memory layers, or report the model class to lightning-fot.",
            )

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Logits of a few fixed tokens, in evaluation mode."""
        training = self.model.training
        self.model.train(False)
        try:
            vocabulary = _text_config(self.model).vocab_size
            ids = (torch.arange(_SELF_TEST_TOKENS) * 7 + 3) % vocabulary
            output = self.model(input_ids=ids[None].to(self.model.device), use_cache=False)
        finally:
            self.model.train(training)
        logits: Tensor = output.logits
        return logits


def attach_memory(model: PreTrainedModel, config: MemoryConfig) -> MemoryLM:
    """Gives a Hugging Face model an external memory.

    Args:
        model: A causal language model of transformers, on any device, in any floating dtype.
        config: Which layers attend to the memory, and how.

    Returns:
        The attached model. ``detach()`` (or leaving a ``with`` block) makes the model what it was, bit for bit.

    Raises:
        SettingError: A layer is out of range, or a self-test finds that the model cannot be served.

    Example:
        >>> from lightning_fot import MemoryConfig, attach_memory
        >>> from lightning_fot.pretrained import load_backbone
        >>> import torch
        >>> with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1], window=16)) as lm:
        ...     out = lm(torch.arange(40)[None])
        >>> out.logits.shape, len(out.memory)
        (torch.Size([1, 40, 384]), 40)
    """
    from lightning_fot.lm import MemoryLM

    if _implementation(model) == INTERFACE:
        raise SettingError(
            "model", type(model).__name__, "already has a memory attached", "Call detach() on the first one."
        )
    return MemoryLM(Attachment(model, config), config)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The stack of layers without the language-model head."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _implementation(model: PreTrainedModel) -> str:
    return str(_text_config(model)._attn_implementation)


def _attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules of the decoder by layer number."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
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


def _backend(implementation: str, layer: nn.Module) -> AttentionFn:
    """The attention function that transformers would choose for a layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
    function: AttentionFn = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function
