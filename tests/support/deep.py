"""What a backbone that is accepted must do right, against an oracle that shares no code with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightning_fot import MemoryConfig, attach_memory
from tests.support.dense_reading import dense_logits
from tests.support.models import tokens
from tests.support.stride_oracle import Text

WINDOW, LENGTH = 12, 31
STRIDE: dict[str, Any] = {"overlap": 4, "sink_tokens": 1}


def deep_faults(
    model: PreTrainedModel, layer: int, states: bool = False, distance: int | None = None
) -> dict[str, str]:
    """What goes wrong with one memory layer, by check; empty where all is right.

    Args:
        model: Tiny, fp32, in evaluation mode.
        layer: The memory layer.
        states: Whether layers keep states: they start anew with each window that is read without an overlap, and the
            oracle reads the whole text.
        distance: At which all tokens see the memory, less than a window; None: at their own.
    """
    config = MemoryConfig(memory_layers=[layer], window=WINDOW, top_k=1000)
    if distance is not None:
        config = replace(config, positions="constant", distance=distance)
    checks: dict[str, Callable[[PreTrainedModel, MemoryConfig], None]] = {
        "plain forward": _plain,
        "window by window": _windows if not states else _first_window,
        "with an overlap": _strides,
        "cached decoding": _decoding,
        "padded batch": _padded,
        "backward": _backward,
    }
    faults = {}
    for name, check in checks.items():
        try:
            check(model, config)
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return faults


def _close(found: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    difference = float((found - expected).abs().max() / expected.std())
    assert difference < tolerance, f"differs by {difference:.2g} of the spread"


def _seen(length: int, **stride: Any) -> list[tuple[list[int], list[int]]]:
    return Text(WINDOW, stride.get("overlap", 0), stride.get("sink_tokens", 0)).read(length).seen


@torch.no_grad()
def _plain(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids = tokens(2, WINDOW)
    expected = model(input_ids=ids, use_cache=False).logits
    with attach_memory(model, config) as lm:
        _close(lm(ids).logits, expected)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected), "is not as before when detached"


@torch.no_grad()
def _windows(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids = tokens(1, LENGTH)
    with attach_memory(model, config) as lm:
        found = lm(ids).logits
    _close(found, dense_logits(model, ids, _seen(LENGTH), config.memory_layers, distance=config.distance))


@torch.no_grad()
def _first_window(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids = tokens(1, LENGTH)
    with attach_memory(model, config) as lm:
        found = lm(ids[:, :WINDOW]).logits
    _close(found, dense_logits(model, ids[:, :WINDOW], _seen(WINDOW), config.memory_layers, distance=config.distance))


@torch.no_grad()
def _strides(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids = tokens(1, LENGTH)
    with attach_memory(model, replace(config, **STRIDE)) as lm:
        found = lm(ids).logits
    _close(found, dense_logits(model, ids, _seen(LENGTH, **STRIDE), config.memory_layers, distance=config.distance))


@torch.no_grad()
def _decoding(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids = tokens(1, LENGTH)
    with attach_memory(model, replace(config, **STRIDE)) as lm:
        out = lm.generate(
            ids[:, :9], max_new_tokens=18, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    text = out.sequences[:, :-1]
    expected = dense_logits(model, text, _seen(text.shape[1], **STRIDE), config.memory_layers, distance=config.distance)
    _close(torch.stack(out.logits, 1), expected[:, 8:])


@torch.no_grad()
def _padded(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[0, :12] = mask[2, :3] = 0
    wanted: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with attach_memory(model, replace(config, **STRIDE)) as lm:
        together = lm.generate(ids, attention_mask=mask, **wanted)
        for row in range(3):
            alone = lm.generate(ids[row : row + 1, mask[row].bool()], **wanted)
            _close(torch.stack(together.logits, 1)[row : row + 1], torch.stack(alone.logits, 1))
        padded = lm(ids, attention_mask=mask).logits[0, 12:]
        _close(padded, lm(ids[:1, 12:]).logits[0])


def _backward(model: PreTrainedModel, config: MemoryConfig) -> None:
    ids = tokens(1, LENGTH)
    weight: Any = model.get_input_embeddings().weight
    with attach_memory(model, replace(config, **STRIDE)) as lm:
        (found,) = torch.autograd.grad(lm(ids, labels=ids).loss, weight)
    logits = dense_logits(model, ids, _seen(LENGTH, **STRIDE), config.memory_layers, True, config.distance)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[0, :-1], ids[0, 1:]), weight)
    _close(found, expected, 2e-3)
