"""Reading beside a memory as a self-test: windows, decoding across a move of the window, padded rows, gradients.

Each is compared with one dense forward in which the backbone's own attention function is given what tokens see
(:mod:`lightning_fot.model.passes.dense`). The texts have ten tokens, so that an attachment costs about a dozen forwards
of a few tokens, and one backward pass that reaches the input embeddings and no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_fot.config.memory import MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.memory.memory import Memory
from lightning_fot.memory.place import MemoryShape
from lightning_fot.memory.token_log import TokensRead
from lightning_fot.model.backbone import self_test
from lightning_fot.model.passes.dense import DensePass, stretches
from lightning_fot.model.passes.way import Attached
from lightning_fot.model.passes.window import WindowPass

if TYPE_CHECKING:
    from lightning_fot.model.passes.local_window import MemoryCache
    from lightning_fot.model.passes.state_layer import StateFacts


class Readable(Attached, Protocol):
    """What the test needs of an attached model."""

    states: StateFacts

    def new_cache(self, memory: Memory, config: MemoryConfig) -> MemoryCache:
        """A cache for texts that go on token by token."""


_WINDOW, _OVERLAP, _SINKS, _TOKENS, _SHORTER = 6, 2, 1, 10, 2
# Differences relative to the spread that still are rounding: root mean squares, of the median token in half precision,
# where a router of experts may choose another on its own.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-3, torch.bfloat16: 0.3, torch.float16: 0.2}


# Kinds of models that this process has found right: a sweep, or a test suite, attaches the same many times.
_RIGHT: set[int] = set()


def refuse_other_readings(attached: Readable) -> None:
    """Raises: SettingError: Reading beside a memory is not what a dense forward says; tells what differs, and where."""
    kind = _kind(attached)
    if kind in _RIGHT:
        return
    if attached.memory_layers and not attached.states.layers:
        _check(attached, "reading two windows", "in window {}", _windows)
    _check(attached, "going on token by token", "in row {} of a padded batch", _decoding)
    _RIGHT.add(kind)


def _kind(attached: Readable) -> int:
    """What the outcome depends on but for the numbers in the weights: modules and their code, settings, layers."""
    modules = [(name, type(part), vars(part).get("forward")) for name, part in attached.model.named_modules()]
    settings = attached.model.config.to_json_string(use_diff=False)
    memory = repr(
        (attached.memory_layers, attached.config.positions, attached.config.far_place, attached.config.attending)
    )
    place = attached.model.dtype, attached.device, torch.is_inference_mode_enabled()
    code = [type(part).forward for part in attached.model.modules()]
    return hash((tuple(modules), tuple(code), settings, memory, place))


def _check(
    attached: Readable, what: str, where: str, pairs: Callable[[Readable], Iterator[tuple[Tensor, Tensor]]]
) -> None:
    model = attached.model
    tolerance = _TOLERANCE.get(model.dtype, 5e-3)
    try:
        for number, (found, expected) in enumerate(pairs(attached)):
            difference = _difference(found, expected)
            if not difference <= tolerance:
                problem = (
                    f"{what} beside a memory differs from one dense pass by {difference:.2g} of the spread "
                    f"{where.format(number)} (rounding would leave less than {tolerance:g})"
                )
                break
        else:
            return
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        problem = f"{what} beside a memory fails ({type(error).__name__}: {reason})"
    raise SettingError(
        "model.backbone",
        type(model).__name__,
        f"{problem}: memory layers {list(attached.memory_layers)} do something that they do not know",
        "Its weights are quantised: some kinds round by what else is in the call. Use one that rounds weights alone (4 "
        "bits of bitsandbytes, int8 weights of torchao), or none."
        if getattr(model, "is_quantized", False)
        else "Choose other memory layers, or report the model class to lightning-fot.",
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of (T, V) tensors."""
    found, expected = found.detach().double(), expected.detach().double()
    errors = (found - expected).square().mean(-1)
    error = errors.median() if found.shape[0] and expected.dtype in (torch.bfloat16, torch.float16) else errors.mean()
    return float((error / expected.var().clamp_min(1e-30)).sqrt())


def _ids(attached: Readable) -> Tensor:
    return self_test.fixed_ids(attached.model, _TOKENS)


def _memory(attached: Readable, rows: int) -> Memory:
    facts = [attached.facts[index] for index in attached.memory_layers]
    shape = MemoryShape(
        attached.memory_layers,
        tuple(fact.kv_heads for fact in facts),
        tuple(fact.head_dim for fact in facts),
        tuple(fact.value_dim for fact in facts),
        attached.model.dtype,
        attached.device,
    )
    return Memory(shape, rows, "exact")


def _dense(attached: Readable, ids: Tensor, overlap: int, sinks: int) -> Tensor:
    """Logits (T, V) of ids (1, T)."""
    parts = stretches(ids.shape[1], _WINDOW, overlap, sinks)
    current = DensePass(parts, _WINDOW, attached.device, attached.config.far_place)
    with attached.during(current):
        logits: Tensor = attached.model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _windows(attached: Readable) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of two windows beside a memory, and the gradients at their embeddings."""
    ids = _ids(attached)

    def by_windows() -> Tensor:
        memory, parts = _memory(attached, 1), []
        for part in torch.split(ids, _WINDOW, dim=1):
            current = WindowPass(memory, _TOKENS)
            with attached.during(current):
                parts.append(attached.model(input_ids=part, use_cache=False).logits[0])
            whole = torch.ones(part.shape, dtype=torch.bool)
            memory.append(current.pairs, None, TokensRead(part, whole, whole))
        return torch.cat(parts)

    readings = (by_windows, lambda: _dense(attached, ids, 0, 0))
    # A backward pass in half precision takes as long as all the rest, and proves little.
    precise = attached.model.dtype in (torch.float32, torch.float64)
    inference = torch.is_inference_mode_enabled() or any(part.is_inference() for part in attached.model.parameters())
    if inference or not precise:
        found, expected = (read() for read in readings)
        gradients: list[Tensor] = []
    else:
        (found, one), (expected, other) = (_with_gradient(attached, read) for read in readings)
        gradients = [] if other is None else [found.new_zeros(0) if one is None else one, other]
    yield from zip(torch.split(found, _WINDOW), torch.split(expected, _WINDOW), strict=True)
    if gradients:
        yield gradients[0], gradients[1]


@contextmanager
def _leaves(attached: Readable) -> Iterator[list[Tensor]]:
    """Embeddings of each forward inside the block, as leaves of the graph."""
    leaves: list[Tensor] = []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        # Some models scale their embeddings in place, which no leaf allows.
        return leaves[-1].clone()

    handle = attached.model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        handle.remove()


def _with_gradient(attached: Readable, read: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Logits (T, V), and the gradient (T, width) of a sum of them at the input; None where the model has none."""
    with _leaves(attached) as leaves:
        logits = read()
        weights = torch.cos(torch.arange(logits.numel(), device=logits.device)).view_as(logits)
        gradients = torch.autograd.grad((logits.float() * weights).mean(), leaves) if logits.requires_grad else None
    return logits, None if gradients is None else torch.cat([part[0] for part in gradients])


def _decoding(attached: Readable) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of two rows, the second shorter, whose windows move while they go on."""
    config = MemoryConfig(
        memory_layers=list(attached.memory_layers),
        window=_WINDOW,
        overlap=_OVERLAP,
        sink_tokens=_SINKS,
        top_k=_TOKENS,
    )
    whole = _ids(attached)
    lengths, prompt = [_TOKENS, _TOKENS - _SHORTER], _WINDOW - 1
    # As in generate: prompts of 5 and 3 tokens, with padding behind the shorter one, go on together.
    rest = _TOKENS - prompt
    ids = torch.cat([whole[:, :prompt], whole[:, :prompt]])
    later = torch.cat([whole[:, prompt:], whole[:, prompt - _SHORTER : _TOKENS - _SHORTER]])
    cache = attached.new_cache(_memory(attached, 2), config)
    cache.ends = torch.tensor([prompt, prompt - _SHORTER])
    while cache.seen < prompt:
        _forward(attached, ids[:, cache.seen : min(prompt, cache.seen + cache.room)], cache)
    cache.ends = None
    logits = []
    while cache.seen < _TOKENS:
        start = cache.seen - prompt
        # The first token comes alone, as in decoding.
        stop = min(rest, start + (1 if start == 0 else cache.room))
        logits.append(_forward(attached, later[:, start:stop], cache))
    found = torch.cat(logits, dim=1)
    for row, length in enumerate(lengths):
        yield found[row], _dense(attached, whole[:, :length], _OVERLAP, _SINKS)[-rest:]


def _forward(attached: Readable, ids: Tensor, cache: Any) -> Tensor:
    before = cache.seen
    logits: Tensor = attached.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    if cache.seen != before + ids.shape[1]:
        raise RuntimeError("its forward does not reach the cache by its decoder")
    return logits
