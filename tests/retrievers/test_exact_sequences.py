"""Exact search, and an index asked for everything, equal brute force after any sequence of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fot.retrievers import KeyStore, create_retriever
from lightning_fot.retrievers.keys.scan import topk_rows

BANKS, DIM = 3, 8

Operation = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, 40), min_size=BANKS, max_size=BANKS)),
    st.tuples(st.just("reset"), st.lists(st.integers(0, BANKS - 1), unique=True)),
    st.tuples(st.just("search"), st.integers(1, 60)),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("remove"), st.floats(0.01, 0.9)),
    st.tuples(st.just("select"), st.lists(st.integers(0, BANKS - 1), min_size=BANKS, max_size=BANKS)),
)

SPECS: dict[str, Any] = {
    "exact": "exact",
    "faiss_ivf": {"name": "faiss_ivf", "min_index_size": 48, "nlist": 4, "nprobe": 4},
    "hnsw": {"name": "hnsw", "min_index_size": 48, "M": 16, "ef_construction": 200, "ef_search": 2000},
}


class Model:
    """Keys of each bank in plain lists beside the retriever under test."""

    def __init__(self, shared: bool, spec: Any) -> None:
        self.retriever = create_retriever(spec, dim=DIM, banks=BANKS, num_threads=1)
        self.store = KeyStore(DIM, BANKS) if shared else None
        if self.store is not None:
            self.retriever.use_store(self.store)
        self.keys = [torch.zeros(0, DIM) for _ in range(BANKS)]
        self.removed: list[set[int]] = [set() for _ in range(BANKS)]

    def add(self, keys: Tensor, counts: list[int]) -> None:
        if self.store is not None:
            self.store.append(keys, torch.tensor(counts))
        self.retriever.add(keys, torch.tensor(counts))
        self.keys = [torch.cat((old, keys[b, : counts[b]])) for b, old in enumerate(self.keys)]

    def reset(self, banks: list[int]) -> None:
        if self.store is not None:
            self.store.reset(banks)
        self.retriever.reset(banks)
        for bank in banks:
            self.keys[bank], self.removed[bank] = self.keys[bank][:0], set()

    def remove(self, share: float, generator: torch.Generator) -> None:
        gone = [(torch.rand(len(keys), generator=generator) < share).nonzero()[:, 0] for keys in self.keys]
        self.retriever.remove([rows if len(rows) else None for rows in gone])
        self.removed = [old | set(rows.tolist()) for old, rows in zip(self.removed, gone, strict=True)]

    def select(self, banks: list[int]) -> None:
        store = self.retriever.store.select(banks)
        chosen = self.retriever.select(banks, store)
        assert chosen is not None
        self.retriever, self.store = chosen, store
        self.keys = [self.keys[bank] for bank in banks]
        self.removed = [self.removed[bank] for bank in banks]

    def fork(self) -> Model:
        twin = Model.__new__(Model)
        twin.store = self.store.fork() if self.store is not None else None
        twin.retriever = self.retriever.fork(twin.store)
        twin.keys, twin.removed = list(self.keys), list(self.removed)
        return twin

    def check(self, queries: Tensor, k: int) -> None:
        rows = self.retriever.search(queries, k)
        assert self.retriever.lengths.tolist() == [len(keys) for keys in self.keys]
        for bank, keys in enumerate(self.keys):
            gone = torch.tensor(sorted(self.removed[bank]), dtype=torch.int64)
            width = min(k, len(keys) - len(gone))
            assert torch.equal(rows[bank, :, width:], torch.full((queries.shape[1], k - width), -1))
            assert not bool(torch.isin(rows[bank], gone).any())
            scores = (queries[bank] @ keys.T).index_fill(1, gone, float("-inf"))
            torch.testing.assert_close(scores.gather(1, rows[bank, :, :width]), scores.topk(width, dim=1).values)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@settings(max_examples=40, deadline=None)
@given(shared=st.booleans(), operations=st.lists(Operation, max_size=14), seed=st.integers(0, 2**16))
def test_any_sequence_equals_brute_force(spec: Any, shared: bool, operations: list[tuple[str, Any]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, others = Model(shared, spec), []
    for name, value in operations:
        if name == "add":
            model.add(torch.randn(BANKS, 40, DIM, generator=generator), value)
        elif name == "reset":
            model.reset(value)
        elif name == "remove":
            model.remove(value, generator)
        elif name == "select":
            model.select(value)
        elif name == "search":
            model.check(torch.randn(BANKS, 5, DIM, generator=generator), value)
        else:
            twin = model.fork()
            others.append(model if value else twin)
            model = twin if value else model
    for each in [model, *others]:
        each.check(torch.randn(BANKS, 5, DIM, generator=generator), 7)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 70000),
    k=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    q=st.integers(1, 3),
)
def test_blocks_and_two_levels_change_nothing(n: int, k: int, dtype: torch.dtype, q: int) -> None:
    generator = torch.Generator().manual_seed(n)
    keys, queries = torch.randn(n, 4, generator=generator).to(dtype), torch.randn(q, 4, generator=generator)
    rows, scores = topk_rows(queries, keys, k)
    every = queries @ keys.float().T
    assert rows.shape == (q, min(k, n))
    assert all(len(set(line)) == len(line) for line in rows.tolist())
    torch.testing.assert_close(scores, every.topk(min(k, n), dim=1).values)
    torch.testing.assert_close(every.gather(1, rows), scores)


def test_banks_that_select_repeats_are_saved_with_what_was_removed(tmp_path: Any) -> None:
    retriever = create_retriever("exact", dim=4)
    keys = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    retriever.add(keys)
    retriever.remove([torch.tensor([3, 5])])
    store = KeyStore(4, 1)
    store.append(keys)
    twice = retriever.select([0, 0], store.select([0, 0]))
    assert twice is not None
    twice.save(tmp_path)
    other = create_retriever("exact", dim=4, banks=2)
    other.load(tmp_path)
    rows = other.search(keys.expand(2, -1, -1), 20)[0]
    assert not set(rows.flatten().tolist()) & {3, 5}
