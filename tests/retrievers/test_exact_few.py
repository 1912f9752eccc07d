"""Exact search for a few queries, in eight bits first: equal to a scan in float64 on keys made to mislead it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fot.retrievers import KeyStore, create_retriever
from lightning_fot.retrievers.exact import ExactRetriever
from lightning_fot.retrievers.keys import native
from lightning_fot.retrievers.keys.codes import CodeBook, Coded, CodedQueries, largest, members, rotation
from lightning_fot.retrievers.keys.int8_scan import few

N, DIM, K = 9_500, 16, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near_ties() -> Tensor:
    """Thousands of keys that differ by far less than eight bits can tell."""
    return random(1, DIM, seed=1) + 1e-4 * random(N, DIM)


def huge_keys() -> Tensor:
    keys = random(N, DIM)
    keys[::997] *= 1e12
    keys[5] *= 1e30
    return keys


def few_distinct() -> Tensor:
    return random(7, DIM)[torch.arange(N) % 7]


def drifting() -> Tensor:
    """Keys that leave what the first chunk looked like, in place and in size."""
    return random(N, DIM) * torch.linspace(0.01, 30, N)[:, None] + torch.linspace(0, 50, N)[:, None]


def far_from_zero() -> Tensor:
    """A mean a thousand times the spread: all the digits are in the difference."""
    return random(N, DIM) + 1000


def one_coordinate() -> Tensor:
    keys = torch.zeros(N, DIM)
    keys[:, 3] = random(N)
    return keys


KEYS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: random(N, DIM),
    "near_ties": near_ties,
    "huge": huge_keys,
    "constant": lambda: torch.ones(N, DIM),
    "zero": lambda: torch.zeros(N, DIM),
    "few_distinct": few_distinct,
    "drifting": drifting,
    "far_from_zero": far_from_zero,
    "one_coordinate": one_coordinate,
    "tiny": lambda: random(N, DIM) * 1e-30,
}
QUERIES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda keys: random(3, DIM, seed=9),
    "keys": lambda keys: keys[[0, len(keys) // 2, -1]].clamp(-1e6, 1e6),
    "spiky": lambda keys: torch.eye(DIM)[[0, 3, 5]] * 1e4 + random(3, DIM, seed=9),
    "zero": lambda keys: torch.zeros(3, DIM),
    "tiny and huge": lambda keys: random(3, DIM, seed=9) * torch.tensor([[1e-36], [1.0], [1e6]]),
}


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled core, where it is installed, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(native.missing())


def assert_best(rows: Tensor, queries: Tensor, keys: Tensor, k: int, removed: Tensor | None = None) -> None:
    """``rows`` (q, k) are k best of keys (n, D), but for ties within what float32 rounds off."""
    exact = queries.double() @ keys.double().T
    if removed is not None:
        exact[:, removed] = float("-inf")
    width = min(k, int((exact[0] > float("-inf")).sum()))
    assert torch.equal(rows[:, width:], torch.full_like(rows[:, width:], -1))
    rows = rows[:, :width]
    assert all(len(set(line)) == width for line in rows.tolist())
    # Rounding is relative to the sizes that are multiplied, not to the score.
    rounding = 1e-6 * (queries.double().abs() @ keys.double().abs().T)
    best = exact.topk(width, dim=1)
    allowed = rounding.gather(1, best.indices) + rounding.gather(1, rows)
    assert bool(((exact.gather(1, rows).sort(descending=True).values - best.values).abs() <= allowed + 1e-37).all())


def filled(keys: Tensor, dtype: torch.dtype = torch.float32) -> tuple[ExactRetriever, KeyStore]:
    """A retriever of keys (banks, n, D) on a store of its own, and the store."""
    store = KeyStore(keys.shape[2], keys.shape[0], dtype)
    retriever = ExactRetriever(keys.shape[2], keys.shape[0])
    retriever.use_store(store)
    store.append(keys)
    retriever.add(keys)
    return retriever, store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_misleading_keys(kind: str, dtype: torch.dtype) -> None:
    keys = KEYS[kind]()
    if dtype == torch.int8:
        keys = keys.clamp(-1e6, 1e6)
    retriever, store = filled(keys[None], dtype)
    for queries in (make(keys) for make in QUERIES.values()):
        for part in (queries[:1], queries):
            assert_best(retriever.search(part[None], K)[0], part, store.bank(0), K)


def bounds_of(asked: CodedQueries, coded: Coded) -> tuple[Tensor, Tensor]:
    """Lowest and highest scores (q, n / GROUP) float64, less the query's with the centre."""
    products = torch.from_numpy(asked.codes).int() @ coded.codes.int().T
    steps = (asked.units @ rotation(DIM)).abs().amax(1, keepdim=True).clamp_min(1e-30).double() / 127
    lowest, highest = asked.bounds(largest(products), coded)
    return torch.from_numpy(lowest) * steps, torch.from_numpy(highest) * steps


@pytest.mark.parametrize("kind", KEYS)
def test_bounds_hold(kind: str) -> None:
    """No score is above its bound, the best of a group reaches the lower one, and codes are worth their bytes."""
    keys = KEYS[kind]()
    coded = CodeBook().upto(keys)
    assert coded is not None
    keys = keys[: coded.size]
    for name, make in QUERIES.items():
        queries = make(keys)
        asked = CodedQueries.of(queries)
        assert torch.equal(asked.units * (1 if asked.sizes is None else torch.from_numpy(asked.sizes)), queries)
        lowest, highest = bounds_of(asked, coded)
        scores = asked.units.double() @ (keys.double() - coded.centre.double()).T
        rows = torch.from_numpy(members(np.arange(len(coded.scales))))
        assert rows.flatten().sort().values.equal(torch.arange(coded.size))
        best = scores[:, rows].amax(2)
        assert bool((lowest <= best).all())
        assert bool((best <= highest).all())
        if kind == name == "random":
            assert bool((highest - lowest <= 0.5 * scores.std(dim=1, keepdim=True)).all())


def test_bounds_hold_for_the_worst_key() -> None:
    """A key that points where the query lost most reaches its bound."""
    query, keys = random(1, DIM), random(4096, DIM, seed=2)
    asked = CodedQueries.of(query)
    turned = asked.units @ rotation(DIM)
    worst = turned - turned.abs().max() / 127 * torch.from_numpy(asked.codes)
    keys[5] = 500 * (worst / worst.norm() @ rotation(DIM).T)[0]
    coded = CodeBook().upto(keys)
    assert coded is not None
    bound = float(bounds_of(asked, coded)[1][0, 5])
    score = float(asked.units[0].double() @ (keys[5] - coded.centre).double())
    lost = float(query.norm() * coded.errors[0, 5])
    assert score <= bound < score + 2.5 * lost


def test_few_queries_use_codes() -> None:
    """What the other tests rely on, where there is the compiled core or the machine multiplies eight bits."""
    retriever, store = filled(random(1, N, DIM))
    assert retriever.nbytes == 0
    retriever.search(random(1, 2, DIM), K)
    assert (store.code_bytes > N * DIM * 0.8) == (few(DIM) > 0)
    assert retriever.nbytes == store.code_bytes <= N * (DIM + 0.4) + 4 * DIM


def test_k_too_large_for_the_codes() -> None:
    keys = random(1, N, DIM)
    retriever, _ = filled(keys)
    for k in (1, 100, 1000, N, N + 5):
        assert_best(retriever.search(keys[:, :2], k)[0], keys[0, :2], keys[0], k)


def test_queries_of_any_number_agree() -> None:
    keys, queries = random(1, 3 * N, DIM), random(1, 700, DIM, seed=3)
    retriever, _ = filled(keys)
    for count in (1, 2, 8, 9, 40, 130, 700):
        assert_best(retriever.search(queries[:, :count], K)[0], queries[0, :count], keys[0], K)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9995])
def test_removed_rows(share: float) -> None:
    keys, queries = random(1, N, DIM), random(1, 4, DIM, seed=3)
    retriever, _ = filled(keys)
    retriever.search(queries, K)
    # The best go first, all those that the codes would have found.
    order = (queries[0, 0] @ keys[0].T).argsort(descending=True)
    gone = order[: int(share * N)]
    retriever.remove([gone])
    for count in (1, 4):
        assert_best(retriever.search(queries[:, :count], K)[0], queries[0, :count], keys[0], K, gone)
    more = random(1, 3000, DIM, seed=4)
    retriever.store.append(more)
    retriever.add(more)
    both = torch.cat((keys, more), 1)
    assert_best(retriever.search(queries, K)[0], queries[0], both[0], K, gone)


def test_keys_taken_back_and_written_anew() -> None:
    """Codes of rows that were overwritten are not believed."""
    keys, other, queries = random(1, N, DIM), random(1, N, DIM, seed=5), random(1, 2, DIM, seed=3)
    retriever, store = filled(keys)
    retriever.search(queries, K)
    for length in (N - 1, 9000, 4096, 100):
        store.truncate([length])
        store.append(other[:, : N - length])
        retriever.add(other[:, : N - length])
        keys = torch.cat((keys[:, :length], other[:, : N - length]), 1)
        assert_best(retriever.search(queries, K)[0], queries[0], keys[0], K)
    store.reset()
    retriever.reset()
    store.append(other)
    retriever.add(other)
    assert_best(retriever.search(queries, K)[0], queries[0], other[0], K)


def test_forks_share_codes_and_part_ways() -> None:
    keys, queries = random(1, N, DIM), random(1, 2, DIM, seed=3)
    retriever, store = filled(keys)
    retriever.search(queries, K)
    held = store.code_bytes
    twin_store = store.fork()
    twin = retriever.fork(twin_store)
    twin.search(queries, K)
    assert twin_store.code_bytes == store.code_bytes == held
    sides = []
    for number, (one, its_store) in enumerate(((retriever, store), (twin, twin_store))):
        more = random(1, N, DIM, seed=10 + number)
        its_store.append(more)
        one.add(more)
        sides.append(torch.cat((keys, more), 1))
    for one, both in zip((retriever, twin), sides, strict=True):
        assert_best(one.search(queries, K)[0], queries[0], both[0], K)


def test_ragged_banks_and_choices_of_them() -> None:
    keys, queries = random(3, N, DIM), random(3, 2, DIM, seed=3)
    lengths = [N, 300, 9001]
    store = KeyStore(DIM, 3)
    retriever = ExactRetriever(DIM, 3)
    retriever.use_store(store)
    for first, last in pairwise((0, 1000, 8000, N)):
        counts = [max(0, min(last, length) - first) for length in lengths]
        store.append(keys[:, first:last], counts)
        retriever.add(keys[:, first:last], counts)
        found = retriever.search(queries, K)
        for bank in range(3):
            assert_best(found[bank], queries[bank], keys[bank, : store.lengths_list[bank]], K)
    chosen = [2, 2, 0, 1]
    some = retriever.select(chosen, store.select(chosen))
    assert some is not None
    found = some.search(queries[chosen], K)
    for bank, rows in zip(chosen, found, strict=True):
        assert_best(rows, queries[bank], keys[bank, : lengths[bank]], K)


def test_growing_while_searched() -> None:
    """Chunks are coded once each, whatever is searched between."""
    keys, queries = random(1, 2 * N, DIM), random(1, 1, DIM, seed=3)
    retriever = create_retriever("exact", dim=DIM)
    for first in range(0, 2 * N, 1500):
        retriever.add(keys[:, first : first + 1500])
        length = min(2 * N, first + 1500)
        assert_best(retriever.search(queries, K)[0], queries[0], keys[0, :length], K)
