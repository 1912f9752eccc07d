"""Any sequence of operations on any backend: exact settings equal brute force, others return true rows only."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fot.retrievers import KeyStore, Retriever, create_retriever

BANKS, DIM, MOST = 2, 8, 90

COUNTS = st.lists(st.integers(0, MOST), min_size=BANKS, max_size=BANKS)
OPERATION = st.one_of(
    st.tuples(st.just("add"), COUNTS),
    st.tuples(st.just("repeat"), COUNTS),
    st.tuples(st.just("remove"), st.floats(0.01, 0.9)),
    st.tuples(st.just("reset"), st.lists(st.integers(0, BANKS - 1), unique=True)),
    st.tuples(st.just("truncate"), st.floats(0, 1)),
    st.tuples(st.just("renumber"), st.floats(0.1, 1)),
    st.tuples(st.just("flush"), st.none()),
    st.tuples(st.just("reload"), st.none()),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("search"), st.integers(1, 60)),
)

# Name -> specification, and whether the index finds everything.
SPECS: dict[str, tuple[Any, bool]] = {
    "exact": ("exact", True),
    "faiss_ivf": ({"name": "faiss_ivf", "min_index_size": 48, "nlist": 2, "nprobe": 2}, True),
    "hnsw": ({"name": "hnsw", "min_index_size": 48, "ef_construction": 200, "ef_search": 2000}, True),
    "faiss_ivf, approximate": ({"name": "faiss_ivf", "min_index_size": 48, "nlist": 4, "nprobe": 1}, False),
    "hnsw, approximate": ({"name": "hnsw", "min_index_size": 48, "M": 2, "ef_construction": 4, "ef_search": 1}, False),
    "scann, approximate": ({"name": "scann", "min_index_size": 64, "num_leaves_to_search": 1, "reorder": 1}, False),
}


class Model:
    """A retriever beside plain lists of keys and removed rows."""

    def __init__(self, spec: Any, exhaustive: bool, shared: bool, build: str) -> None:
        name = {"name": spec} if isinstance(spec, str) else spec
        self.spec = {**name, "num_threads": 1, "build": build}
        self.exhaustive = exhaustive
        self.retriever: Retriever = create_retriever(self.spec, dim=DIM, banks=BANKS)
        self.store = KeyStore(DIM, BANKS) if shared else None
        if self.store is not None:
            self.retriever.use_store(self.store)
        self.keys = [torch.zeros(0, DIM)] * BANKS
        self.removed: list[set[int]] = [set() for _ in range(BANKS)]

    def do(self, name: str, value: Any, generator: torch.Generator) -> Model | None:
        """One operation; the fork, where there is one."""
        if name in ("add", "repeat"):
            keys = torch.randn(BANKS, MOST, DIM, generator=generator)
            if name == "repeat":
                keys = keys[:, torch.arange(MOST) % 30]
            if self.store is not None:
                self.store.append(keys, value)
            self.retriever.add(keys, value)
            self.keys = [torch.cat((old, keys[b, : value[b]])) for b, old in enumerate(self.keys)]
        elif name == "remove":
            gone = [(torch.rand(len(keys), generator=generator) < value).nonzero()[:, 0] for keys in self.keys]
            self.retriever.remove(gone)
            self.removed = [old | set(rows.tolist()) for old, rows in zip(self.removed, gone, strict=True)]
        elif name == "reset":
            if self.store is not None:
                self.store.reset(value)
            self.retriever.reset(value)
            for bank in value:
                self.keys[bank], self.removed[bank] = self.keys[bank][:0], set()
        elif name == "truncate" and self.store is not None:
            lengths = [int(value * len(keys)) for keys in self.keys]
            self.store.truncate(lengths)
            self.keys = [keys[:length] for keys, length in zip(self.keys, lengths, strict=True)]
            self.removed = [{r for r in old if r < n} for old, n in zip(self.removed, lengths, strict=True)]
        elif name == "renumber" and self.store is not None:
            masks = [torch.rand(len(keys), generator=generator) < value for keys in self.keys]
            self.store.keep(masks)
            self.retriever.renumber()
            self.keys = [keys[mask] for keys, mask in zip(self.keys, masks, strict=True)]
            self.removed = [set() for _ in range(BANKS)]
        elif name == "flush":
            self.retriever.flush()
        elif name == "reload" and self.store is None:
            with tempfile.TemporaryDirectory() as folder:
                self.retriever.save(folder)
                self.retriever = create_retriever(self.spec, dim=DIM, banks=BANKS)
                self.retriever.load(folder)
        elif name == "fork":
            twin = Model.__new__(Model)
            twin.__dict__.update(self.__dict__)
            twin.store = None if self.store is None else self.store.fork()
            twin.retriever = self.retriever.fork(twin.store)
            twin.keys, twin.removed = list(self.keys), [set(old) for old in self.removed]
            return twin
        elif name == "search":
            self.check(torch.randn(BANKS, 3, DIM, generator=generator), value)
        return None

    def check(self, queries: Tensor, k: int) -> None:
        rows = self.retriever.search(queries, k)
        assert rows.shape == (BANKS, queries.shape[1], k)
        assert self.retriever.lengths.tolist() == [len(keys) for keys in self.keys]
        assert self.retriever.stats().fallbacks == 0 or not self.exhaustive
        for bank, keys in enumerate(self.keys):
            gone = torch.tensor(sorted(self.removed[bank]), dtype=torch.int64)
            width = min(k, len(keys) - len(gone))
            scores = (queries[bank] @ keys.T).index_fill(1, gone, float("-inf"))
            for line in rows[bank].tolist():
                real = [row for row in line if row >= 0]
                assert len(set(real)) == len(real) <= width
                assert all(row < len(keys) and row not in self.removed[bank] for row in real)
            if self.exhaustive:
                assert bool((rows[bank, :, width:] == -1).all())
                found = scores.gather(1, rows[bank, :, :width])
                torch.testing.assert_close(found, scores.topk(width, dim=1).values)


@pytest.mark.parametrize(("spec", "exhaustive"), SPECS.values(), ids=SPECS.keys())
@pytest.mark.filterwarnings("ignore:HNSWRetriever. search failed:RuntimeWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shared=st.booleans(),
    build=st.sampled_from(["background", "blocking"]),
    operations=st.lists(OPERATION, min_size=4, max_size=14),
    number=st.integers(0, 2**16),
)
@example(True, "blocking", [("add", [0, 2]), ("remove", 0.5), ("truncate", 0.5), ("remove", 0.5)], 0)
@example(True, "blocking", [("add", [1, 2]), ("remove", 0.9), ("truncate", 0.0)], 0)
@example(True, "blocking", [("add", [90, 90]), ("flush", None), ("truncate", 0.5), ("add", [90, 60])], 0)
@example(True, "background", [("add", [90, 90]), ("search", 5), ("fork", True), ("add", [90, 90]), ("flush", None)], 0)
def test_any_sequence(
    spec: Any, exhaustive: bool, shared: bool, build: str, operations: list[tuple[str, Any]], number: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    model, others = Model(spec, exhaustive, shared, build), []
    for name, value in operations:
        twin = model.do(name, value, generator)
        if twin is not None:
            others.append(model if value else twin)
            model = twin if value else model
    for each in [model, *others]:
        each.check(torch.randn(BANKS, 3, DIM, generator=generator), 7)
