"""What the base class does around an index: tail, rescoring, hubs, forks, and indexes that fail."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.config.retriever import TransformSpec
from lightning_fot.errors import SettingError
from lightning_fot.retrievers import KeyStore, PerBankRetriever, create_retriever
from lightning_fot.retrievers.index.build import Recipe, build
from lightning_fot.retrievers.index.jobs import Job, StoppedError
from lightning_fot.testing import real_qk


class Brute:
    """An exact index that counts."""

    adds = 0

    def __init__(self) -> None:
        self.keys = np.zeros((0, 0), dtype=np.float32)

    def add(self, keys: NDArray[np.float32]) -> None:
        type(self).adds += 1
        self.keys = np.concatenate((self.keys, keys)) if self.keys.size else keys

    def search(self, queries: NDArray[np.float32], k: int) -> Any:
        return np.argsort(-(queries @ self.keys.T), axis=1)[:, :k]


class Blocking(PerBankRetriever):
    """Builds in the search that finds it due: what happens does not depend on the time."""

    def __init__(self, dim: int, banks: int = 1, **kwargs: Any) -> None:
        super().__init__(dim, banks, **{"build": "blocking", **kwargs})


class BruteRetriever(Blocking):
    def new_index(self, dim: int) -> Brute:
        return Brute()


def answer(kind: str, rows: NDArray[np.int64]) -> Any:
    if kind == "raises":
        raise RuntimeError("broken on purpose")
    return {
        "shape": rows[:, :-1],
        "range": rows + 10**6,
        "duplicates": np.zeros_like(rows),
        "floats": rows.astype(np.float32),
    }[kind]


class BadRetriever(Blocking):
    kind = "raises"

    def new_index(self, dim: int) -> Brute:
        kind = self.kind

        class Bad(Brute):
            def search(self, queries: NDArray[np.float32], k: int) -> Any:
                return answer(kind, super().search(queries, k))

        return Bad()


def keys_and_queries(n: int = 1500) -> tuple[Tensor, Tensor]:
    qk = real_qk()["L20h1"]
    return qk["keys"][:, :n], qk["queries"][:, :20]


def exact_rows(keys: Tensor, queries: Tensor, k: int) -> Tensor:
    return (queries @ keys.transpose(1, 2)).topk(k, dim=2).indices


@pytest.mark.parametrize("kind", ["raises", "shape", "range", "duplicates", "floats"])
def test_a_bad_index_becomes_exact_search_with_one_warning(kind: str) -> None:
    keys, queries = keys_and_queries()
    retriever = type("Bad", (BadRetriever,), {"kind": kind})(64, min_index_size=100)
    retriever.add(keys)
    with pytest.warns(RuntimeWarning, match="Exact search answers instead"):
        rows = retriever.search(queries, 8)
    assert torch.equal(rows, exact_rows(keys, queries, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retriever.search(queries, 8)
    assert retriever.stats().fallbacks == 2


def test_a_failing_build_is_not_repeated_at_every_search() -> None:
    class NoBuild(Blocking):
        tries = 0

        def new_index(self, dim: int) -> Brute:
            type(self).tries += 1
            raise MemoryError("no room")

    keys, queries = keys_and_queries()
    retriever = NoBuild(64, min_index_size=100)
    retriever.add(keys[:, :1000])
    with pytest.warns(RuntimeWarning, match="no room"):
        retriever.search(queries, 8)
    retriever.add(keys[:, 1000:])
    assert torch.equal(retriever.search(queries, 8), exact_rows(keys, queries, 8))
    assert (NoBuild.tries, retriever.stats().fallbacks) == (1, 1)


@pytest.mark.parametrize("transform", ["auto", "none", {"center": True}, {"query_power": 0.5, "l2_augment": True}])
def test_tail_hubs_and_transforms_keep_an_exact_index_exact(transform: Any) -> None:
    keys, queries = keys_and_queries(3000)
    retriever = BruteRetriever(64, transform=transform, min_index_size=256)
    retriever.observe(real_qk()["L20h1"]["past_queries"])
    done = 0
    for count in (300, 10, 500, 40, 1000, 20, 1130):
        retriever.add(keys[:, done : done + count])
        done += count
        want = (queries @ keys[:, :done].transpose(1, 2)).topk(16, dim=2).values
        rows = retriever.search(queries, 16)
        scores = (queries @ keys[:, :done].transpose(1, 2)).gather(2, rows)
        torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-3)
    assert 256 <= int(retriever.indexed[0]) <= done


def test_bf16_store_is_searched_in_fp32() -> None:
    from lightning_fot.retrievers import KeyStore

    keys, queries = keys_and_queries()
    store = KeyStore(64, 1, torch.bfloat16)
    retriever = BruteRetriever(64, min_index_size=100)
    retriever.use_store(store)
    store.append(keys)
    retriever.add(keys)
    stored = keys.bfloat16().float()
    scores = (queries @ stored.transpose(1, 2)).gather(2, retriever.search(queries, 8))
    torch.testing.assert_close(scores, (queries @ stored.transpose(1, 2)).topk(8, dim=2).values)


def test_a_fork_shares_the_index_and_nobody_changes_it_while_shared() -> None:
    keys, queries = keys_and_queries(2600)
    retriever = BruteRetriever(64, min_index_size=256)
    retriever.add(keys[:, :2000])
    retriever.flush()
    twin = retriever.fork()
    assert int(twin.indexed[0]) == 2000
    assert twin.stats().rebuilds == 0
    want = twin.search(queries, 8)
    retriever.add(keys[:, 2000:2300])
    retriever.flush()
    assert retriever.stats().rebuilds == 2
    assert int(twin.indexed[0]) == 2000
    assert torch.equal(twin.search(queries, 8), want)
    # Alone again, it extends in place.
    twin.add(keys[:, 2000:2300])
    twin.flush()
    assert (twin.stats().rebuilds, int(twin.indexed[0])) == (0, 2300)


def test_store_emptied_behind_its_back() -> None:
    from lightning_fot.retrievers import KeyStore

    keys, queries = keys_and_queries()
    store = KeyStore(64, 1)
    retriever = BruteRetriever(64, min_index_size=100)
    retriever.use_store(store)
    store.append(keys)
    retriever.add(keys)
    retriever.flush()
    store.reset()
    assert int(retriever.search(queries, 4).max()) == -1


class Trained(Brute):
    """Notes what it learns from, and refuses keys before."""

    def __init__(self) -> None:
        super().__init__()
        self.learned: tuple[int, int] | None = None
        self.pieces: list[int] = []

    def train(self, keys: NDArray[np.float32], count: int) -> None:
        self.learned = (len(keys), count)

    def add(self, keys: NDArray[np.float32]) -> None:
        assert self.learned is not None
        self.pieces.append(len(keys))
        super().add(keys)


@pytest.mark.parametrize("transform", ["auto", "none", {"center": True}, {"query_power": 0.5}])
def test_a_long_bank_is_indexed_in_pieces(transform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fot.retrievers.index.build.AT_ONCE", 700)
    keys, queries = real_qk()["L20h1"]["keys"].clone(), real_qk()["L20h1"]["queries"]
    keys[0, 3000] *= 50  # not among those that the transform is learned from

    class Retriever(Blocking):
        default_duplicate_distance = 0.0

        def new_index(self, dim: int) -> Trained:
            return Trained()

    retriever = Retriever(64, transform=transform, min_index_size=256)
    retriever.observe(real_qk()["L20h1"]["past_queries"])
    for start, end in ((0, 4000), (4000, keys.shape[1])):  # built, then extended
        retriever.add(keys[:, start:end])
        retriever.flush()
        want = (queries @ keys[:, :end].transpose(1, 2)).topk(16, dim=2).values
        found = (queries @ keys[:, :end].transpose(1, 2)).gather(2, retriever.search(queries, 16))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)
    built = retriever._built[0]
    assert built is not None
    assert isinstance(built.index, Trained)
    assert built.index.learned == (700, 4000)
    assert max(built.index.pieces) <= 700
    assert sum(built.index.pieces) == built.size == keys.shape[1]
    assert retriever.stats().rebuilds == 1


def test_cells_of_a_long_bank_are_as_good_when_built_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = real_qk()["L10h0"]["keys"], real_qk()["L10h0"]["queries"]
    want = exact_rows(keys, queries, 32)
    shares = []
    for at_once in (len(keys[0]), 3000):
        monkeypatch.setattr("lightning_fot.retrievers.index.build.AT_ONCE", at_once)
        spec = {"name": "faiss_ivf", "nlist": 64, "nprobe": 8, "min_index_size": 256, "index_dtype": "int8"}
        retriever = create_retriever(spec, dim=64)
        retriever.observe(real_qk()["L10h0"]["past_queries"])
        # Sorted by one coordinate: whoever learned from the first piece alone would know one side only.
        order = keys[0, :, 0].argsort()
        retriever.add(keys[:, order])
        retriever.flush()
        rows = order[retriever.search(queries, 32)]
        shares.append(float((rows[..., None] == want[..., None, :]).any(-1).float().mean()))
    assert shares[0] > 0.85
    assert shares[1] > shares[0] - 0.03


def test_a_row_twice_as_long_is_trained_anew() -> None:
    keys, _ = keys_and_queries(6000)
    retriever = BruteRetriever(64, min_index_size=256)
    for start in range(0, 6000, 100):
        retriever.add(keys[:, start : start + 100])
        retriever.search(keys[:, :1], 4)
    assert retriever.stats().rebuilds == 5
    assert retriever.stats().searches == 60


def test_hubs_are_set_apart_on_keys_with_sinks() -> None:
    qk = real_qk()["L20h1"]
    retriever = BruteRetriever(64, min_index_size=256)
    retriever.observe(qk["past_queries"])
    retriever.add(qk["keys"])
    retriever.flush()
    built = retriever._built[0]
    assert built is not None
    sinks = (qk["keys"][0].norm(dim=1) < 6).nonzero().squeeze(1)
    assert len(sinks) > 0
    assert set(sinks.tolist()) <= set(built.apart.tolist())
    assert len(built.apart) <= 6144 // 64


def test_an_extension_broken_off_leaves_no_row_hidden_that_is_not_scored() -> None:
    """Which rows are set apart depends on those they come with: flags of rows that were not taken in must go."""
    keys, queries = real_qk()["L20h1"]["keys"][0], real_qk()["L20h1"]["queries"][0]
    store = KeyStore(keys.shape[1])
    store.append(keys[None])
    built = build(Recipe(lambda dim: Brute(), TransformSpec(center=True)), store, 0, 3000, queries)

    class Stopping(Job):
        """Ends the work when it has asked twice whether to go on."""

        asked = 0

        def check(self) -> None:
            self.asked += 1
            if self.asked > 2:
                raise StoppedError

    with pytest.raises(StoppedError):
        built.extend(store, 0, 5000, Stopping(print))
    assert 3000 < built.size < 5000
    job = Job(lambda job: built.extend(store, 0, len(keys), job))
    job.wanted_by.add(store)
    job.run()
    assert job.error is None
    assert np.flatnonzero(built.hidden).tolist() == sorted(built.apart.tolist())
    assert built.size == len(keys)


@pytest.mark.parametrize("count", [1, 200])
def test_queries_that_are_not_finite_are_refused_and_huge_ones_are_not(count: int) -> None:
    retriever = create_retriever("exact", dim=16)
    for value in (1e30, 3e38, -3e38):
        retriever.observe(torch.full((1, count, 16), value))
    for value in (float("nan"), float("inf"), float("-inf")):
        queries = torch.zeros(1, count, 16)
        queries[0, -1, 3] = value
        with pytest.raises(SettingError, match="not finite"):
            retriever.search(queries, 3)
