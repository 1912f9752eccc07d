"""Hooks on a transformers model, by which its memory layers serve the pass of the call in progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from threading import Lock, RLock, local
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_fot.errors import SettingError
from lightning_fot.memory.token_log import UNKNOWN_TOKEN
from lightning_fot.model.attention.rotary import Embeddings, RotaryFn, find_rotary, fitted, identity_rotary, turn_pairs
from lightning_fot.model.backbone.calls import Calls
from lightning_fot.model.backbone.layers import (
    check_replay,
    checkpointing,
    decoder_of,
    expansion,
    following_length,
    forget_length,
    rotary_modules,
)
from lightning_fot.model.passes.base import AttentionFn, LayerCall, Pass, TextPass
from lightning_fot.model.passes.probe import LayerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Attribute of a cosine table that names the pass which its layers served: the table outlives the pass where layers are
# run again in the backward pass.
_PASS = "lightning_fot_pass"
# Attribute of a cosine table: the rotation (cos, sin) of the place that queries ask the memory from.
_FAR = "lightning_fot_far"


_WEIGHTS_ALONE: ContextVar[bool] = ContextVar("lightning_fot_weights_alone", default=False)


@contextmanager
def weights_alone() -> Iterator[None]:
    """Inside the block a model with a memory may be copied: the copy has its weights, and no memory attached."""
    token = _WEIGHTS_ALONE.set(True)
    try:
        yield
    finally:
        _WEIGHTS_ALONE.reset(token)


def _nothing(*args: Any) -> None:
    """The hook of a copy that has the weights alone."""


class OfOneModel:
    """A hook, bound to the model that it was put on.

    A copy of the model would carry it along: it would serve the first model's passes, or nothing.

    Args:
        hook: What torch calls.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> OfOneModel:
        if _WEIGHTS_ALONE.get():
            return OfOneModel(_nothing)
        raise uncopyable()

    def __reduce__(self) -> Any:
        raise uncopyable()


def uncopyable() -> SettingError:
    """The error for copying or pickling what has a memory attached."""
    return SettingError(
        "model",
        "a model with a memory attached",
        "cannot be copied or pickled: its hooks serve this one alone",
        "Detach the memory, copy or save the plain model, and attach a memory to each; save_pretrained writes both.",
    )


class KeptCaches:
    """Suspends gradient checkpointing where a cache is read or written and no gradients are wanted.

    Transformers takes the cache away from layers that may be run again, whatever the gradient mode: tokens would then
    be generated without what was read before.

    Args:
        model: The backbone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._lock = Lock()
        self._calls = 0
        self._suspended: list[Any] = []
        self._mine = local()

    def begin(self) -> None:
        """Before a forward that is given a cache."""
        suspends = not torch.is_grad_enabled() and (self._model.training or self._calls > 0)
        # Forwards are nested: the first one of generation reads the prompt.
        self._nested().append(suspends)
        if suspends:
            with self._lock:
                self._calls += 1
                for layer in self._model.modules():
                    if layer.training and getattr(layer, "gradient_checkpointing", False):
                        self._suspended.append(layer)
                        setattr(layer, "gradient_checkpointing", False)  # noqa: B010 - modules have no such attribute

    def end(self) -> None:
        """After it, however it ended."""
        nested = self._nested()
        if nested and nested.pop():
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    for layer in self._suspended:
                        layer.gradient_checkpointing = True
                    self._suspended = []

    def _nested(self) -> list[bool]:
        """Of each forward that this thread is in, whether it suspends."""
        found: list[bool] = self._mine.__dict__.setdefault("nested", [])
        return found


class Hooks:
    """Hooks on the attention layers, the decoder and the rotary modules of one model.

    Args:
        model: The backbone.
        attentions: Its attention layers by number.
        backends: The attention function that each of them used before.
        memory_layers: Which of them are memory layers.
        calls: What the model is doing.
        selected: Tells whether the model takes its attention from this package now.
        check_attached: Raises where it does not, and a call needs it to.

    Attributes:
        facts: What is known of each layer.
        gates: (H,) logits of the memory's share, by layer.
        positions: ``none``: memory layers do not rotate.
        distance: Place from which all queries ask the memory, whose keys are at position 0; None asks from their own.
        score_factor: Factor on scores of memory layers, where a call does not set its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attentions: Mapping[int, nn.Module],
        backends: Mapping[int, AttentionFn],
        memory_layers: tuple[int, ...],
        calls: Calls,
        selected: Callable[[], bool],
        check_attached: Callable[[], None],
    ) -> None:
        self.model = model
        self.memory_layers = memory_layers
        self.calls = calls
        self.facts: dict[int, LayerFacts] = {}
        self.gates: dict[int, nn.Parameter] = {}
        self.positions = "first"
        self.distance: int | None = None
        # Whether rotary modules give complex numbers: noted when one first does.
        self._complex = False
        self.score_factor = 1.0
        self._kept = KeptCaches(model)
        self._backends = backends
        self._selected = selected
        self._check_attached = check_attached
        self._handles = [
            layer.register_forward_pre_hook(OfOneModel(self._before_attention(index, layer)), with_kwargs=True)
            for index, layer in attentions.items()
        ]
        self._handles += self._on_decoder()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        raise uncopyable()

    def __reduce__(self) -> Any:
        raise uncopyable()

    @property
    def in_place(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def remove(self) -> None:
        """Takes all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def enter(self, current: Pass) -> Any:
        """Makes ``current`` what memory layers serve in this thread; ``calls.end`` of what it gives goes back.

        Raises:
            SettingError: The pass cannot be run again as gradient checkpointing would.
        """
        functions = checkpointing(self.model)
        if functions:
            check_replay(current, functions)
        return self.calls.begin(current=current, replayable=bool(functions))

    def _before_attention(self, index: int, layer: nn.Module) -> Any:
        rotary = find_rotary(layer)
        expand = expansion(layer)
        is_memory_layer = index in self.memory_layers
        # In the form of Llama's, once the size of a head is known.
        fitting: list[RotaryFn] = []

        def before_attention(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = prepared(layer, args, kwargs)
            if found is not None and isinstance(found[1].get("position_embeddings"), tuple) and self._complex:
                # As the layer knows them; all else is told of real and imaginary parts, as of cos and sin.
                found[1]["position_embeddings"] = torch.complex(*found[1]["position_embeddings"])
            return found

        def prepared(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            state = self.calls.state
            # Without our interface the call would reach a foreign attention function as an unknown argument. Within a
            # pass it is known to be ours: asking transformers' configuration takes longer than the rest of this hook.
            if state.current is None and not self._selected():
                return None
            call = LayerCall(index, self._backends[index], is_memory_layer=is_memory_layer, expand=expand)
            kwargs = {**kwargs, "fot_layer": call}
            embeddings: Embeddings | None = kwargs.get("position_embeddings")
            current = state.current
            if current is None and embeddings is not None:
                # A layer that is run again in the backward pass: its embeddings are those of the first run.
                current = getattr(embeddings[0], _PASS, None)
            if current is None or not (is_memory_layer or current.serves_all_layers):
                return args, kwargs
            call.current = current
            call.gate = self.gates.get(index)
            if is_memory_layer:
                call.score_factor = self.score_factor if state.score_factor is None else state.score_factor
            if embeddings is None:
                # Given as None they say that nothing rotates.
                named = "position_embeddings" in kwargs
                if (rotary is not None and not named and (is_memory_layer or current.unrotated)) or state.replayable:
                    raise SettingError(
                        "model.backbone",
                        type(self.model).__name__,
                        f"layer {index} is not given its rotary embeddings by name",
                        "This model class cannot have memory layers yet, or not with gradient checkpointing.",
                    )
                return args, kwargs
            if state.replayable:
                setattr(embeddings[0], _PASS, current)
            if state.probing:
                call.position_embeddings = embeddings
                kwargs["position_embeddings"] = tuple(torch.full_like(part, torch.nan) for part in embeddings)
                return args, kwargs
            length = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
            facts = self.facts.get(index)
            if facts is None:
                # Attention without a softmax, though it is named so: it is given its own tokens' embeddings alone.
                kwargs["position_embeddings"] = tuple(half[:, -length:] for half in embeddings)
                return args, kwargs
            # positions="none" concerns memory layers alone.
            if facts.rotates and (self.positions != "none" or not is_memory_layer):
                if not fitting and self._complex:
                    fitting.append(turn_pairs)
                elif not fitting and rotary is not None:
                    fitting.append(fitted(rotary, facts.head_dim, embeddings[0].shape[-1]))
                call.position_embeddings, call.rotary = embeddings, fitting[0] if fitting else None
                call.plain_at_zero = facts.plain_at_zero
                if is_memory_layer and self.distance is not None:
                    call.far = self._far(index, embeddings)
            if is_memory_layer or current.unrotated or expand is not None:
                kwargs["position_embeddings"] = self._identity(embeddings, length)
            else:
                cos, sin = embeddings
                if cos.shape[1] != length:
                    kwargs["position_embeddings"] = cos[:, -length:], sin[:, -length:]
                if facts.rotates:
                    current.before_rotation(call)
            return args, kwargs

        return before_attention

    def _far(self, index: int, embeddings: Embeddings) -> Embeddings:
        """(cos, sin), each (B or 1, 1, R), of ``distance``.

        Raises:
            SettingError: The layer's embeddings are not as a rotary module gave them.
        """
        far: Embeddings | None = getattr(embeddings[0], _FAR, None)
        if far is None:
            raise SettingError(
                "model.memory.positions",
                "constant",
                f"layer {index} of {type(self.model).__name__} is not given its rotary embeddings as a module of the "
                "decoder makes them, so that the rotation by a distance is not known",
                "Set positions=first, or use another backbone.",
            )
        return far

    def _identity(self, embeddings: Embeddings, length: int) -> Embeddings:
        """(cos, sin) that rotate nothing, for the last ``length`` columns of the real ones."""
        state = self.calls.state
        known = state.identities.get(id(embeddings))
        if known is not None and known[0] is embeddings:
            return known[1]
        cos, sin = embeddings
        identity = identity_rotary((cos[:, -length:], sin[:, -length:]))
        if state.current is not None:
            state.identities[id(embeddings)] = embeddings, identity
        return identity

    def _on_decoder(self) -> list[Any]:
        """Hooks that let a :class:`TextPass` given as ``past_key_values`` rule the forward it is given to."""
        decoder = decoder_of(self.model)

        takes_positions = "position_ids" in signature(decoder.forward).parameters

        def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = kwargs.get("past_key_values")
            if cache is not None:
                self._kept.begin()
            if not isinstance(cache, TextPass):
                current = self.calls.state.current
                if current is None or current.places is None or not takes_positions:
                    return None
                return args, {**kwargs, "position_ids": current.places}
            self._check_attached()
            inputs = args[0] if args else kwargs.get("input_ids")
            if inputs is None:
                embeddings = kwargs["inputs_embeds"]
                named: Any = cache.named
                if named is not None and named.shape == embeddings.shape[:2]:
                    inputs = named
                else:
                    inputs = torch.full(embeddings.shape[:2], UNKNOWN_TOKEN, device=embeddings.device)
            given = kwargs.get("attention_mask")
            # Some models make masks by kind of layer before: the cache has its own.
            mask: Tensor | None = given if isinstance(given, Tensor) and given.ndim == 2 else None
            # Before anything of the cache is changed.
            functions = checkpointing(self.model)
            if functions:
                check_replay(cache, functions)
            cache.begin(inputs, None if mask is None else mask[:, -inputs.shape[1] :])
            self.enter(cache)
            if takes_positions and cache.positions is not None:
                # Learned and absolute positions count from the start of the window as well.
                places = cache.positions[:, -inputs.shape[1] :].to(inputs.device)
                return args, {**kwargs, "position_ids": places.expand(inputs.shape)}
            return None

        def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if isinstance(cache, TextPass):
                cache.named = kwargs.get("input_ids", args[0] if args else None)

        def after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache = kwargs.get("past_key_values")
            if cache is not None:
                self._kept.end()
            if isinstance(cache, TextPass) and self.calls.state.current is cache:
                cache.end(completed=output is not None)
                self.calls.end()

        def local_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            current = self.calls.state.current
            positions = None if current is None else current.positions
            if current is not None and self.distance is not None:
                asked = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
                asked = asked if positions is None else positions
                # Rotated as one more token in front; `without_far` takes it out again.
                positions = torch.cat([torch.full_like(asked[..., :1], self.distance), asked], dim=-1)
            if positions is None:
                return None
            if "position_ids" in kwargs:
                return args, {**kwargs, "position_ids": positions}
            return (args[0], positions, *args[2:]), kwargs

        def without_far(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.calls.state.current is None:
                return None
            if isinstance(output, torch.Tensor) and output.is_complex():
                self._complex, output = True, (output.real.contiguous(), output.imag.contiguous())
            if self.distance is None:
                return output
            cos, sin = (half[..., 1:, :] for half in output)
            setattr(cos, _FAR, tuple(half[..., :1, :] for half in output))
            return cos, sin

        # Frequencies that follow the length are kept in the module: one call at a time may look at them, and what an
        # earlier call has read says nothing of this one.
        turn = RLock()

        def before_following(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            turn.acquire()
            if self.calls.state.current is not None:
                forget_length(module)

        def after_following(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            turn.release()

        following = following_length(self.model)
        return [
            *(module.register_forward_pre_hook(OfOneModel(before_following), with_kwargs=True) for module in following),
            *(
                module.register_forward_hook(OfOneModel(after_following), with_kwargs=True, always_call=True)
                for module in following
            ),
            self.model.register_forward_pre_hook(OfOneModel(before_model), with_kwargs=True),
            decoder.register_forward_pre_hook(OfOneModel(before_decoder), with_kwargs=True),
            decoder.register_forward_hook(OfOneModel(after_decoder), with_kwargs=True, always_call=True),
            *(
                module.register_forward_pre_hook(OfOneModel(local_positions), with_kwargs=True)
                for module in rotary_modules(self.model).values()
            ),
            *(
                module.register_forward_hook(OfOneModel(without_far), with_kwargs=True)
                for module in rotary_modules(self.model).values()
            ),
        ]
