"""Attaching memory layers to a Hugging Face model through its public attention interface, and detaching them again.

No forward is patched and no parameter is renamed. A hook on each attention layer passes memory layers an identity
rotation, so that queries and keys reach the attention function after biases and norms, yet not rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_fot.config.memory import MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.memory.token_log import UNKNOWN_TOKEN
from lightning_fot.model.attention.rotary import Embeddings, find_rotary, identity_rotary
from lightning_fot.model.backbone.layers import (
    attention_function,
    attention_layers,
    check_replay,
    checkpointing,
    decoder_of,
    evaluation_mode,
    following_length,
    text_config,
)
from lightning_fot.model.passes.base import LayerCall, Pass, StopForward, memory_attention_forward
from lightning_fot.model.passes.crossbatch import CollectPass
from lightning_fot.model.passes.dilated import DilatedPass
from lightning_fot.model.passes.probe import LayerFacts, ProbePass
from lightning_fot.model.passes.rectified import RectifiedPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INTERFACE = "lightning_fot"
# Largest difference of logits, relative to their spread, that still is rounding.
_PARITY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_SELF_TEST_TOKENS = 8
# Attribute of a cosine table that names the pass which its layers served: the table outlives the pass where layers are
# run again in the backward pass.
_PASS = "lightning_fot_pass"


class Attachment:
    """The hooks that turn chosen attention layers of a model into memory layers.

    Args:
        model: A causal language model of transformers that uses its ``AttentionInterface``.
        config: Which layers, and how they read.

    Attributes:
        score_factor: Factor on the scores of memory layers; may be changed between calls.

    Raises:
        SettingError: The model or one of the layers cannot be served; the message says why, and the model is as before.
    """

    def __init__(self, model: PreTrainedModel, config: MemoryConfig) -> None:
        self.model = model
        self.attentions = attention_layers(model)
        self.memory_layers = config.resolve_layers(len(self.attentions))
        self._text_config = text_config(model)
        self._positions = config.positions
        self.score_factor = 1.0  # until the self-test has compared with the backbone
        self._current: Pass | None = None
        self._probing = False
        self._replayable = False
        # Layers of one forward share their rotary embeddings: what is derived from them is made once.
        self._identities: dict[int, tuple[Embeddings, Embeddings]] = {}
        self.facts: dict[int, LayerFacts] = {}
        self.gates: dict[int, nn.Parameter] = {}
        self._refuse_sliding_layers()
        self._original = self._implementation
        self._backends = {index: attention_function(self._original, layer) for index, layer in self.attentions.items()}
        self._handles = [
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer in self.attentions.items()
        ]
        self._handles += self._cache_hooks()
        try:
            with torch.no_grad(), evaluation_mode(model):
                reference = self._logits()
                self._select_interface()
                self._probe()
                self._refuse_narrow_layers(config.window)
                self._check_parity(reference, CollectPass())
                if config.max_distance is not None:
                    self._check_parity(reference, RectifiedPass(_SELF_TEST_TOKENS, _SELF_TEST_TOKENS, model.device))
                if config.segments:
                    self._refuse_following_positions(config.segments)
                    # One segment without a gap is plain attention.
                    plain = [(max(config.segments), 1)]
                    self._check_parity(reference, DilatedPass(plain, _SELF_TEST_TOKENS, 1, 1, model.device))
                self.score_factor = float(config.score_factor)
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

    @property
    def _implementation(self) -> str:
        return str(self._text_config._attn_implementation)

    def detach(self) -> None:
        """Takes the hooks away; the model computes what it computed before, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._implementation != self._original:
            self.model.set_attn_implementation(self._original)

    def check_attached(self) -> None:
        """Refuses to go on where the memory layers would be plain layers without a word.

        Raises:
            SettingError: The memory was detached, or the model was given another attention since.
        """
        if not self._handles:
            raise SettingError(
                "model", type(self.model).__name__, "the memory is detached from it", "Attach the memory again."
            )
        if self._implementation != INTERFACE:
            raise SettingError(
                "attn_implementation",
                self._implementation,
                "was set after the memory was attached, so that the memory layers are plain layers",
                "Detach the memory, set it, and attach the memory again.",
            )

    @contextmanager
    def during(self, current: Pass) -> Iterator[None]:
        """Memory layers serve ``current`` inside the block; a forward that it stops early ends quietly.

        Raises:
            SettingError: The memory is detached, or the pass cannot be run again as gradient checkpointing would.
        """
        self.check_attached()
        outer = self._enter(current)
        try:
            yield
        except StopForward:
            pass
        finally:
            self._leave(outer)

    def _enter(self, current: Pass) -> tuple[Pass | None, bool]:
        """Makes ``current`` what memory layers serve; gives what they served before."""
        outer = self._current, self._replayable
        functions = checkpointing(self.model)
        if functions:
            check_replay(current, functions)
        self._current, self._replayable = current, bool(functions)
        return outer

    def _leave(self, outer: tuple[Pass | None, bool]) -> None:
        self._current, self._replayable = outer
        self._identities.clear()

    def _hook(self, index: int) -> Any:
        rotary = find_rotary(self.attentions[index])
        is_memory_layer = index in self.memory_layers

        def before_attention(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Without our interface the call would reach a foreign attention function as an unknown argument. Within a
            # pass it is known to be ours: asking transformers' configuration takes longer than the rest of this hook.
            if self._current is None and self._implementation != INTERFACE:
                return None
            call = LayerCall(index, self._backends[index], is_memory_layer=is_memory_layer)
            kwargs = {**kwargs, "fot_layer": call}
            embeddings: Embeddings | None = kwargs.get("position_embeddings")
            current = self._current
            if current is None and embeddings is not None:
                # A layer that is run again in the backward pass: its embeddings are those of the first run.
                current = getattr(embeddings[0], _PASS, None)
            if current is None or not (is_memory_layer or current.serves_all_layers):
                return args, kwargs
            call.current = current
            call.gate = self.gates.get(index)
            call.score_factor = self.score_factor if is_memory_layer else 1.0
            if embeddings is None:
                if (rotary is not None and (is_memory_layer or current.unrotated)) or self._replayable:
                    raise SettingError(
                        "model.backbone",
                        type(self.model).__name__,
                        f"layer {index} is not given its rotary embeddings by name",
                        "This model class cannot have memory layers yet, or not with gradient checkpointing.",
                    )
                return args, kwargs
            if self._replayable:
                setattr(embeddings[0], _PASS, current)
            if self._probing:
                call.position_embeddings = embeddings
                kwargs["position_embeddings"] = tuple(torch.full_like(part, torch.nan) for part in embeddings)
                return args, kwargs
            length = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
            facts = self.facts[index]
            # positions="none" concerns memory layers alone.
            if facts.rotates and (self._positions == "first" or not is_memory_layer):
                call.position_embeddings, call.rotary = embeddings, rotary
                call.plain_at_zero = facts.plain_at_zero
            if is_memory_layer or current.unrotated:
                kwargs["position_embeddings"] = self._identity(embeddings, length)
            else:
                cos, sin = embeddings
                if cos.shape[1] != length:
                    kwargs["position_embeddings"] = cos[:, -length:], sin[:, -length:]
                if facts.rotates:
                    current.before_rotation(call)
            return args, kwargs

        return before_attention

    def _identity(self, embeddings: Embeddings, length: int) -> Embeddings:
        """(cos, sin) that rotate nothing, for the last ``length`` columns of the real ones."""
        known = self._identities.get(id(embeddings))
        if known is not None and known[0] is embeddings:
            return known[1]
        cos, sin = embeddings
        identity = identity_rotary((cos[:, -length:], sin[:, -length:]))
        if self._current is not None:
            self._identities[id(embeddings)] = embeddings, identity
        return identity

    def _cache_hooks(self) -> list[Any]:
        """Hooks that let a :class:`MemoryCache` given as ``past_key_values`` rule the forward it is given to."""
        from lightning_fot.model.passes.local_window import MemoryCache

        decoder = decoder_of(self.model)
        outer: list[tuple[Pass | None, bool]] = []

        def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, MemoryCache):
                return
            self.check_attached()
            inputs = args[0] if args else kwargs.get("input_ids")
            if inputs is None:
                embeddings = kwargs["inputs_embeds"]
                inputs = torch.full(embeddings.shape[:2], UNKNOWN_TOKEN, device=embeddings.device)
            mask = kwargs.get("attention_mask")
            cache.begin(inputs, None if mask is None else mask[:, -inputs.shape[1] :])
            outer.append(self._enter(cache))

        def after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(kwargs.get("past_key_values"), MemoryCache) and outer:
                kwargs["past_key_values"].end(completed=output is not None)
                self._leave(outer.pop())

        def local_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            positions = None if self._current is None else self._current.positions
            if positions is None:
                return None
            if "position_ids" in kwargs:
                return args, {**kwargs, "position_ids": positions}
            return (args[0], positions, *args[2:]), kwargs

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
        types = getattr(self._text_config, "layer_types", None) or []
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

    def _refuse_following_positions(self, segments: list[int]) -> None:
        if following_length(self.model):
            raise SettingError(
                "model.memory.segments",
                segments,
                "cannot be had with positions whose frequencies change as a text goes on",
                "Choose another model.rope.type, or a backbone of fixed frequencies.",
            )

    def _refuse_narrow_layers(self, window: int) -> None:
        for index in self.memory_layers:
            seen = self.facts[index].sliding_window
            if seen is not None and seen < window:
                raise SettingError(
                    "model.memory.window",
                    window,
                    f"layer {index} of this backbone sees {seen} tokens back, so that a part of each window would be "
                    "in neither its local context nor its memory",
                    f"Use a window of at most {seen}.",
                )

    def _select_interface(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask, sdpa_mask

        AttentionInterface.register(INTERFACE, memory_attention_forward)
        AttentionMaskInterface.register(INTERFACE, eager_mask if self._original == "eager" else sdpa_mask)
        self.model.set_attn_implementation(INTERFACE)
        if self._implementation != INTERFACE:
            raise SettingError(
                "model.backbone",
                type(self.model).__name__,
                "does not take its attention from transformers' AttentionInterface",
                "Use a model class that supports it (most of transformers 5 do).",
            )

    def _probe(self) -> None:
        probe = ProbePass()
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

    def _check_parity(self, reference: Tensor, current: Pass) -> None:
        """An attached model with an empty memory must be the backbone (checked with the backbone's own positions)."""
        positions, self._positions = self._positions, "first"
        try:
            with self.during(current):
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

    def _logits(self) -> Tensor:
        """Logits of a few fixed tokens."""
        ids = (torch.arange(_SELF_TEST_TOKENS) * 7 + 3) % self._text_config.vocab_size
        logits: Tensor = self.model(input_ids=ids[None].to(self.model.device), use_cache=False).logits
        return logits
