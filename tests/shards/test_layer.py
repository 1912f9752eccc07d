"""A memory in shards is the memory in one process, whatever is done to it."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.errors import SettingError
from lightning_fot.memory import Memory
from lightning_fot.memory.found import Attended, Retrieved, Scoring, Shown
from tests.support import shards
from tests.support.shards import SHARDS, attended, contents, new_memory, read_text

# Eight bits: what shards store differs by roundings from what one process does.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.int8: 0.15}


class Pair:
    """The same memory twice: in shards, and in this process."""

    def __init__(self, own: Memory, other: Memory) -> None:
        self.own, self.other = own, other

    def both(self, change: Any) -> Any:
        outcomes = []
        for memory in (self.own, self.other):
            try:
                outcomes.append(change(memory))
            except SettingError as error:
                outcomes.append(str(error))
        return outcomes

    def check(self, seed: int) -> None:
        own, other = self.own, self.other
        dtype = own.shape.dtype
        close = {"atol": CLOSE[dtype], "rtol": 1e-3}
        assert own.lengths.tolist() == other.lengths.tolist()
        assert own.forgotten.tolist() == other.forgotten.tolist()
        assert own.documents == other.documents
        draw = random.Random(seed)
        heads = own.shape.kv_heads[0]
        queries = torch.randn(own.batch_size, heads, 3, 8, generator=torch.Generator().manual_seed(seed))
        k, softcap = draw.choice([1, 3, 7, 500]), draw.choice([None, 2.0])
        scoring = Scoring(0.3, softcap, weights=draw.random() < 0.5)
        for number, layer in own.layers.items():
            for mine, theirs in zip(contents(layer), contents(other.layers[number]), strict=True):
                for got, want in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(got, want, **close, check_dtype=True)
            keys, values, lengths = layer.keys, layer.values, layer.lengths
            found = layer.read(queries, k, 0, scoring)
            if not len(other):
                assert found is None
                continue
            blocks = [block for bank in range(own.batch_size * heads) for block in layer.key_blocks(bank, 5)]
            whole = [keys[row, head, : lengths[row]] for row in range(own.batch_size) for head in range(heads)]
            torch.testing.assert_close(torch.cat([part for _, part in blocks]), torch.cat(whole))
            # Exact for what it holds; and what it holds is what one process holds, up to the coding.
            want, lse = attended(keys, values, lengths, queries, k, 0.3, softcap)
            rows = layer.search(queries, k)
            if dtype != torch.int8:
                assert torch.equal(rows.sort(-1).values, other.layers[number].search(queries, k).sort(-1).values)
            gathered = layer.gather(rows)
            self._check_gathered(gathered, keys, values, rows)
            if isinstance(found, Shown):
                assert scoring.weights
                continue
            assert isinstance(found, Attended)
            torch.testing.assert_close(found.out.double(), want, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(found.lse.double(), lse, atol=1e-4, rtol=1e-3)
            if scoring.weights:
                assert found.rows is not None
                assert found.scores is not None
                missing = rows.shape[-1] - found.rows.shape[-1]
                padded = torch.nn.functional.pad(found.rows, (0, missing), value=-1)
                assert torch.equal(padded.sort(-1).values, rows.sort(-1).values)

    @staticmethod
    def _check_gathered(found: Retrieved, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        assert torch.equal(found.valid, rows >= 0)
        for whole, got in ((keys, found.keys), (values, found.values)):
            index = rows.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, whole.shape[-1])
            want = whole.gather(2, index).view(*rows.shape, -1)
            assert torch.equal(got[found.valid], want[found.valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    ["exact", pytest.param({"name": "hnsw", "min_index_size": 16, "ef_search": 500, "build": "blocking",
                            "num_threads": 1}, marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.slow
def test_any_sequence_of_changes(cluster: Any, dtype: torch.dtype, spec: Any) -> None:
    where = shards.place(SHARDS)

    @settings(max_examples=6, deadline=None)
    @given(seed=st.integers(0, 10**9))
    def run(seed: int) -> None:
        _sequence(where, dtype, spec, seed, 12)

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_some_sequences_of_changes(cluster: Any, dtype: torch.dtype) -> None:
    where = shards.place(SHARDS)
    for seed in (1, 2):
        _sequence(where, dtype, "exact", seed, 8)


def _sequence(where: Any, dtype: torch.dtype, spec: Any, seed: int, steps: int) -> None:
    draw = random.Random(seed)
    like = shards.shape(dtype, heads=draw.choice([1, 2]))
    rows, capacity = draw.choice([1, 2, 3]), draw.choice([None, 30, 60])
    pairs = [Pair(new_memory(where, like, rows, spec, capacity=capacity), new_memory(None, like, rows, spec,
             capacity=capacity))]  # fmt: skip
    for step in range(steps):
        pair = draw.choice(pairs)
        kind = draw.choice(["read", "read", "read", "forget", "snapshot", "rows", "reset", "copy"])
        number = draw.getrandbits(30)
        if kind == "read":
            counts = [draw.randint(0, 20) for _ in range(pair.own.batch_size)]
            name = draw.choice(["a", "b", None])
            if max(counts):
                pair.both(lambda memory, c=counts, n=number, name=name: read_text(memory, c, n, name))
        elif kind == "forget":
            name = draw.choice(["a", "b"])
            got, want = pair.both(lambda memory, name=name: memory.forget(name))
            assert got == want
        elif kind == "reset" and draw.random() < 0.3:
            pair.both(lambda memory: memory.reset())
        elif kind == "rows":
            index = torch.tensor([draw.randrange(pair.own.batch_size) for _ in range(draw.choice([1, 2, 4]))])
            pairs.append(Pair(pair.own.select_rows(index), pair.other.select_rows(index)))
        elif kind in ("snapshot", "copy"):
            taken = copy.deepcopy if kind == "copy" else Memory.snapshot
            pairs.append(Pair(taken(pair.own), taken(pair.other)))
        for one in pairs[-3:]:
            one.check(seed + step)


def test_a_long_text_is_cut_into_parts_of_all_shards(cluster: Any) -> None:
    where, like = shards.place(SHARDS), shards.shape(heads=1)
    own, other = new_memory(where, like, 2), new_memory(None, like, 2)
    for memory in (own, other):
        read_text(memory, [5000, 3100], 0)
    Pair(own, other).check(3)
    held = own.layers[1].held.rows  # type: ignore[attr-defined]
    assert all(sum(row.held(shard) for row in held) > 500 for shard in range(3))


def test_few_queries_and_many_are_answered_alike(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fot.shards import asking as module

    memory = new_memory(shards.place(SHARDS), shards.shape(), 2)
    for seed in range(4):
        read_text(memory, [25, 30], seed)
    queries = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(9))
    answers = []
    for most in (0, 1 << 30):
        monkeypatch.setattr(module, "ONE_CALL_BYTES", most)
        found = memory.layers[1].read(queries, 10, 0, Scoring(0.4, weights=True))
        assert isinstance(found, Attended)
        answers.append(found)
    for name in ("out", "lse", "scores"):
        torch.testing.assert_close(getattr(answers[0], name), getattr(answers[1], name))
    assert torch.equal(answers[0].rows, answers[1].rows)


def test_a_change_that_fails_leaves_no_trace(cluster: Any) -> None:
    memory = new_memory(shards.place(SHARDS), shards.shape(torch.int8), 1)
    read_text(memory, [20], 0)
    before = contents(memory.layers[1])
    with pytest.raises(SettingError, match="dtype='int8'"):
        read_text(memory, [20], 1, size=1e37)
    assert memory.lengths.tolist() == [20]
    for got, want in zip(contents(memory.layers[1])[0], before[0], strict=True):
        assert torch.equal(got, want)
    read_text(memory, [20], 2)
    assert memory.lengths.tolist() == [40]


def test_what_measurements_ask(cluster: Any) -> None:
    spec = {"name": "faiss_ivf", "min_index_size": 32, "nlist": 2, "nprobe": 2, "build": "blocking"}
    memory = new_memory(shards.place(SHARDS), shards.shape(), 1, spec)
    for seed in range(6):
        read_text(memory, [40], seed)
    memory.flush()
    layer = memory.layers[1]
    layer.search(torch.randn(1, 2, 3, 8), 4)
    stats = layer.retriever.stats()
    assert stats.adds == 6
    assert stats.rebuilds > 0
    assert stats.build_seconds > 0
    assert layer.indexed_share > 0.5
    assert layer.nbytes > 240 * 2 * (8 + 6) * 4
    assert 0 < layer.retriever.nbytes < layer.nbytes
    layer.use_retriever("exact")
    assert layer.retriever.exact
    assert layer.indexed_share == 0


def test_it_is_saved_and_not_pickled(cluster: Any) -> None:
    memory = new_memory(shards.place(SHARDS), shards.shape(), 1)
    with pytest.raises(SettingError, match=r"Save it with Memory\.save"):
        pickle.dumps(memory.layers[1])
