"""Beside exact search a decoding step leaves nothing for the host to wait for, where the pairs lie on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fot.memory.layer import MemoryLayer
from lightning_fot.model.attention.softmax import attend
from lightning_fot.retrievers.keys import native

# A device that does its work some other time: what asks for a number of it, or how many there are, has to wait.
DEVICE = torch.device("meta")
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "item")


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait, and copies from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if any(value.device.type == DEVICE.type for value in given):
            copied = (kwargs or {}).get("device")
            if name.startswith(WAITS) or (name == "_to_copy" and copied is not None and copied != DEVICE):
                self.seen[name] += 1
                raise AssertionError(f"the host waits: {name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


def filled(dtype: torch.dtype, pairs: int) -> MemoryLayer:
    layer = MemoryLayer.empty(2, 3, 16, 16, "exact", dtype, DEVICE)
    # What reads a text may wait: numbers are checked there.
    layer.key_store.append_raw(torch.empty(6, pairs, 16, dtype=dtype, device=DEVICE), None, [pairs] * 6)
    layer.value_store.append_raw(torch.empty(6, pairs, 16, dtype=dtype, device=DEVICE), None, [pairs] * 6)
    return layer


def step(layer: MemoryLayer) -> Tensor:
    """What a memory layer does for one token."""
    query = torch.empty(2, 9, 1, 16, device=DEVICE)
    key, value = torch.empty(2, 2, 3, 40, 16, device=DEVICE)
    outside = layer.read(query.view(2, 3, 3, 16), 8)
    return attend(query, key, value, outside, scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [5, 300, 40_000])
def test_a_step_waits_for_nothing(dtype: torch.dtype, pairs: int) -> None:
    layer = filled(dtype, pairs)
    with torch.no_grad(), Waits() as waits:
        assert step(layer).shape == (2, 9, 1, 16)
        layer.dropped = [3, 3]
        assert step(layer).shape == (2, 9, 1, 16)
    assert not waits.seen


def test_rows_that_were_removed_do_not_change_that() -> None:
    layer = filled(torch.float32, 20_000)
    for masks in (layer.retriever._removed._masks, layer.retriever._removed._counts):
        masks[:] = [torch.zeros(10_000, dtype=torch.bool, device=DEVICE) if masks[0] is None else 7] * 6
    with torch.no_grad(), Waits() as waits:
        assert step(layer).shape == (2, 9, 1, 16)
    assert not waits.seen


@pytest.mark.parametrize(
    "ask",
    [
        lambda tensor: tensor.sum().item(), lambda tensor: bool(tensor.any()), lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(), lambda tensor: tensor.nonzero(), lambda tensor: tensor[tensor > 0],
    ],
)  # fmt: skip
def test_what_would_wait_is_seen(ask: Callable[[Tensor], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Waits():
        ask(torch.empty(3, device=DEVICE))
