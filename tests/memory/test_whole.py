"""Whatever changes a memory changes all of it or nothing, wherever an exception strikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_fot.memory import Memory, MemoryShape
from lightning_fot.memory.layer import MemoryLayer
from lightning_fot.memory.token_log import TokenLog, TokensRead
from lightning_fot.retrievers import Retriever
from lightning_fot.retrievers.exact import ExactRetriever
from lightning_fot.retrievers.keys.store import KeyStore

SHAPE = MemoryShape((1, 3), (2, 2), (8, 8), (8, 8), torch.float32, torch.device("cpu"))
HNSW = {"name": "hnsw", "min_index_size": 16, "build": "blocking", "num_threads": 1}


class OwnKeys(ExactRetriever):
    """Keeps keys of its own, as a plug-in may."""

    def add(self, keys: Any, lengths: Any = None) -> None:
        super().add(keys, lengths)
        self.taken = getattr(self, "taken", 0) + keys.shape[1]


def read(memory: Memory, count: int, seed: int, name: str | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        layer: (torch.randn(2, 2, count, 8, generator=generator), torch.randn(2, 2, count, 8, generator=generator))
        for layer in SHAPE.layers
    }
    lengths = torch.tensor([count, count - 1])
    valid = torch.arange(count) < lengths[:, None]
    ids = torch.randint(0, 99, (2, count), generator=generator)
    if name is not None:
        memory.log.begin([name, name])
    memory.append(pairs, lengths, TokensRead(ids, valid, valid))


def state(memory: Memory) -> list[Any]:
    tensors, documents = memory.log.state()
    rows = [
        (row, layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
        for layer in memory.layers.values()
        for row, length in enumerate(layer.lengths)
    ]
    queries = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(5))
    found = [layer.search(queries, 5) for layer in memory.layers.values()] if len(memory) else []
    return [rows, sorted(tensors.items()), documents, memory.lengths, memory.forgotten, memory.documents, found]


def same(some: Any, other: Any) -> bool:
    if isinstance(some, torch.Tensor):
        return torch.equal(some, other)
    if isinstance(some, list | tuple):
        return len(some) == len(other) and all(same(*pair) for pair in zip(some, other, strict=True))
    return bool(some == other)


PLACES: list[tuple[Any, str]] = [
    (KeyStore, "append"), (KeyStore, "append_raw"), (KeyStore, "keep"), (KeyStore, "reset"),
    (Retriever, "add"), (Retriever, "remove"), (Retriever, "renumber"),
    (MemoryLayer, "append"), (MemoryLayer, "drop_oldest"), (MemoryLayer, "keep"),
    (TokenLog, "extend"), (TokenLog, "keep"),
]  # fmt: skip
CHANGES: dict[str, Callable[[Memory], Any]] = {
    "append": lambda memory: read(memory, 9, 3),
    "overflow": lambda memory: read(memory, 30, 4),
    "forget": lambda memory: memory.forget("two"),
    "reset": lambda memory: memory.reset(),
}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("exact", id="exact"),
        pytest.param(HNSW, id="hnsw", marks=pytest.mark.slow),
        pytest.param(OwnKeys, id="own keys", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("error", [pytest.param(RuntimeError, marks=pytest.mark.slow), KeyboardInterrupt])
def test_a_change_that_fails_leaves_no_trace(
    spec: Any, change: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Memory:
        memory = Memory(SHAPE, 2, spec, capacity=60)
        for number, name in enumerate(("one", "two", "three")):
            read(memory, 18, number, name)
        return memory

    changed = made()
    before = state(changed)
    CHANGES[change](changed)
    want, struck = state(changed), 0
    for owner, name in PLACES:
        for late in (False, True):
            for count in (1, 2, 3, 4):
                memory = made()
                calls, work = [0], getattr(owner, name)

                def strikes(
                    *args: Any, calls: Any = calls, work: Any = work, late: bool = late, count: int = count, **kw: Any
                ) -> Any:
                    calls[0] += 1
                    strike = calls[0] == count
                    if strike and not late:
                        raise error("strikes")
                    done = work(*args, **kw)
                    if strike:
                        raise error("strikes")
                    return done

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, strikes)
                    try:
                        CHANGES[change](memory)
                    except error:
                        struck += 1
                        patch.undo()
                        assert same(state(memory), before), (owner, name, count, late)
                        CHANGES[change](memory)
                    else:
                        break
                assert same(state(memory), want), (owner, name, count, late)
    assert struck >= 4
