"""Attaching memory layers to a Hugging Face model through its public attention interface, and detaching them again.

No forward is patched and no parameter is renamed. A hook on each attention layer passes memory layers an identity
rotation, so that queries and keys reach the attention function after biases and norms, yet not rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_fot.config.memory import MemoryConfig
from lightning_fot.config.retriever import layer_spec
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone import deep_test, self_test
from lightning_fot.model.backbone.calls import Calls
from lightning_fot.model.backbone.hooks import Hooks
from lightning_fot.model.backbone.layers import (
    attention_function,
    attention_layers,
    chosen_layers,
    evaluation_mode,
    expansion,
    layer_count,
    state_layers,
    text_config,
)
from lightning_fot.model.passes.base import Pass, StopForward, memory_attention_forward
from lightning_fot.model.passes.local_window import MemoryCache
from lightning_fot.model.passes.probe import LayerFacts, ProbePass
from lightning_fot.model.passes.recorder import Recorder
from lightning_fot.model.passes.state_layer import StateFacts
from lightning_fot.model.passes.way import way_of
from lightning_fot.retrievers.registry import check_retriever

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_fot.memory.memory import Memory

INTERFACE = "lightning_fot"


class Attachment:
    """A model whose chosen attention layers are memory layers: what reading, saving and naming it need to know.

    Args:
        model: A causal language model of transformers that uses its ``AttentionInterface``.
        config: Which layers, and how they read.

    Attributes:
        attentions: Attention layers by number.
        num_layers: Layers of the backbone, those without attention included.
        states: Layers that keep states.
        latents: Layers that keep latents in place of keys and values.
        memory_layers: Numbers of the memory layers, counted from 0.
        way: How they attend.

    Raises:
        SettingError: The model or one of the layers cannot be served, or the retriever cannot be made; the message says
            why, and the model is as before.
        MissingLibraryError: The retriever's library is not installed.
    """

    def __init__(self, model: PreTrainedModel, config: MemoryConfig) -> None:
        self.model = model
        self.config = config
        self_test.refuse_offloaded(model)
        self_test.refuse_virtual_tokens(model)
        self_test.refuse_lost_softcap(model)
        self.attentions = attention_layers(model)
        self._calling = self_test.calling(model, self.attentions)
        self_test.refuse_compiled(self._calling)
        self.num_layers = layer_count(model, self.attentions)
        self.memory_layers = chosen_layers(model, config, self.attentions, self.num_layers)
        check_retriever(config.retriever)
        for index in self.memory_layers:
            layer_spec(config.retriever, index)
        self_test.refuse_layers_without_attention(self.memory_layers, self.attentions, self.num_layers)
        self.states = StateFacts(
            {
                index: (layer.number_of_states, index in self.attentions)
                for index, layer in state_layers(model, self.num_layers).items()
            }
        )
        self.latents = frozenset(index for index, layer in self.attentions.items() if expansion(layer) is not None)
        self.way = way_of(config)
        self.calls = Calls()
        self_test.refuse_partial_layers(model, self.memory_layers)
        self_test.refuse_shared_layers(model, self.memory_layers)
        self_test.refuse_short_chunks(model, config.window)
        self._original = self._implementation
        backends = {index: attention_function(self._original, layer) for index, layer in self.attentions.items()}
        self.hooks = Hooks(
            model,
            self.attentions,
            backends,
            self.memory_layers,
            self.calls,
            lambda: self._implementation == INTERFACE,
            self.check_attached,
        )
        try:
            with torch.no_grad(), evaluation_mode(model):
                self._test()
        except BaseException as error:
            self.detach()
            if isinstance(error, SettingError) or not isinstance(error, Exception):
                raise
            raise self_test.unservable(model, error) from error
        # The test compared with the backbone's own scores and positions.
        self.hooks.score_factor = float(config.score_factor)
        self.hooks.positions = config.positions

    @property
    def facts(self) -> dict[int, LayerFacts]:
        """What one probing forward told of each layer."""
        return self.hooks.facts

    @property
    def gates(self) -> dict[int, nn.Parameter]:
        """(H,) logits of the memory's share, by layer; empty without gates."""
        return self.hooks.gates

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.model.device

    @property
    def vocabulary(self) -> int:
        """Tokens that the backbone knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    @property
    def recorder(self) -> Recorder | None:
        """What passes of this thread note; None notes nothing."""
        return self.calls.state.recorder

    @property
    def score_factor(self) -> float:
        """Factor on the scores of memory layers, in this thread."""
        own = self.calls.state.score_factor
        return self.hooks.score_factor if own is None else own

    @contextmanager
    def asked_with(self, score_factor: float | None) -> Iterator[None]:
        """Another factor on the scores of memory layers inside the block; None leaves it."""
        with self.calls.during(score_factor=self.calls.state.score_factor if score_factor is None else score_factor):
            yield

    def attention_scale(self, layer: int) -> float:
        """Factor between inner products and the scores of a layer's softmax, the score factor included.

        Scores that have a soft cap (:meth:`softcap`) are capped afterwards.
        """
        return self.facts[layer].scale * self.score_factor

    def softcap(self, layer: int) -> float | None:
        """``c`` of ``c · tanh(score / c)``, which a layer's scores go through before its softmax; None without."""
        return self.facts[layer].softcap

    def window_pass(self, length: int) -> Pass | None:
        """What serves a window of ``length`` tokens alone; None where the way of attending leaves it to the caller."""
        return self.way.window_pass(length, self.device)

    def new_cache(self, memory: Memory, config: MemoryConfig, recorder: Recorder | None = None) -> MemoryCache:
        """A cache for texts that go on token by token.

        Args:
            memory: What is attended to; extended when a local window moves.
            config: Window, overlap and sinks.
            recorder: What is noted; None notes nothing.
        """
        return MemoryCache(memory, config, self.num_layers, recorder, self.states, self.latents)

    @property
    def _implementation(self) -> str:
        return str(text_config(self.model)._attn_implementation)

    def detach(self) -> None:
        """Takes the hooks away; the model computes what it computed before, bit for bit."""
        self.hooks.remove()
        if self._implementation != self._original:
            self.model.set_attn_implementation(self._original)

    def check_attached(self) -> None:
        """Refuses to go on where the memory layers would be plain layers without a word.

        Raises:
            SettingError: The memory was detached, or the model was given another attention since.
        """
        if not self.hooks.in_place:
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
        self_test.refuse_virtual_tokens(self.model)
        self_test.refuse_compiled(self._calling)

    @contextmanager
    def during(self, current: Pass) -> Iterator[None]:
        """Memory layers serve ``current`` inside the block; a forward that it stops early ends quietly.

        Raises:
            SettingError: The memory is detached, or the pass cannot be run again as gradient checkpointing would.
        """
        self.check_attached()
        token = self.hooks.enter(current)
        try:
            yield
        except StopForward:
            pass
        finally:
            self.calls.end(token)

    def _test(self) -> None:
        reference = self_test.logits_of(self.model)
        if self.states.layers:
            self.states = replace(self.states, one_by_one=not self_test.goes_on_in_parts(self.model, reference))
        self._select_interface()
        probe = ProbePass()
        with self.calls.during(probing=True), self.during(probe), self_test.learned_positions(self.model) as rooms:
            self_test.logits_of(self.model)
        self_test.refuse_short_tables(rooms, self.config.window)
        self.hooks.facts = probe.facts
        self_test.refuse_silent_layers(self.facts, self.memory_layers)
        self_test.refuse_layers_that_ask_twice(self.facts, self.memory_layers)
        self_test.refuse_narrow_layers(self.facts, self.memory_layers, self.config.window)
        self_test.refuse_following_positions(self.model, self.way)
        if self.config.far_place is not None:
            self_test.refuse_constant_positions(self.model, self.facts, self.memory_layers, self.config.far_place)
            self.hooks.distance = self.config.far_place
        for current in self_test.plain_passes(self.way, self.device):
            with self.during(current):
                logits = self_test.logits_of(self.model)
            self_test.refuse_other_logits(self.model, reference, logits)
        if self._original in ("eager", "sdpa"):
            # Other functions take no mask of ours.
            deep_test.refuse_other_readings(self)

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
