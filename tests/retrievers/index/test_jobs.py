"""Indexes built beside the caller: nobody waits, nothing is lost, nothing stale is taken into use."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.retrievers import KeyStore, PerBankRetriever, create_retriever
from tests.support.patience import PATIENCE_S

DIM = 8


class Held:
    """An exact index whose ``add`` waits until the test opens the door."""

    door = threading.Event()
    begun = threading.Event()
    error: Exception | None = None

    def __init__(self) -> None:
        self.keys = np.zeros((0, DIM + 1), dtype=np.float32)

    def add(self, keys: NDArray[np.float32]) -> None:
        type(self).begun.set()
        assert type(self).door.wait(30)
        if type(self).error is not None:
            raise type(self).error
        self.keys = np.concatenate((self.keys, keys))

    def search(self, queries: NDArray[np.float32], k: int) -> Any:
        return np.argsort(-(queries @ self.keys.T), axis=1)[:, :k]


class HeldRetriever(PerBankRetriever):
    def new_index(self, dim: int) -> Held:
        return Held()


@pytest.fixture(autouse=True)
def doors() -> Iterator[None]:
    Held.door.clear()
    Held.begun.clear()
    Held.error = None
    yield
    Held.door.set()


def numbers(n: int, seed: int = 0) -> Tensor:
    return torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(seed))


def check(retriever: PerBankRetriever, keys: Tensor) -> None:
    queries = numbers(6, seed=99)
    scores = queries @ keys.transpose(1, 2)
    rows = retriever.search(queries, 5)
    torch.testing.assert_close(scores.gather(2, rows), scores.topk(5, dim=2).values)


def building(n: int = 200, **kwargs: Any) -> tuple[HeldRetriever, Tensor]:
    """A retriever whose first index is being built, and waits for the door."""
    retriever, keys = HeldRetriever(DIM, min_index_size=100, **kwargs), numbers(n)
    retriever.add(keys)
    check(retriever, keys)
    assert Held.begun.wait(30)
    return retriever, keys


def test_searches_and_adds_go_on_during_a_build_and_flush_waits_for_it() -> None:
    retriever, keys = building()
    for step in range(3):
        more = numbers(30, seed=step + 1)
        retriever.add(more)
        keys = torch.cat((keys, more), 1)
        check(retriever, keys)
    assert int(retriever.indexed[0]) == 0
    Held.door.set()
    retriever.flush()
    assert int(retriever.indexed[0]) == 290
    check(retriever, keys)
    stats = retriever.stats()
    assert (stats.rebuilds, stats.fallbacks, len(stats.build_times)) == (1, 0, 2)
    assert sum(stats.build_times) == pytest.approx(stats.build_seconds)


def test_an_extension_is_taken_into_use_without_flush() -> None:
    Held.door.set()
    retriever, keys = building()
    retriever.flush()
    retriever.add(numbers(90, 1))
    keys = torch.cat((keys, numbers(90, 1)), 1)
    for _ in range(2000):
        check(retriever, keys)
        if int(retriever.indexed[0]) == 290 and len(retriever.stats().build_times) == 2:
            return
        threading.Event().wait(0.005)
    raise AssertionError("never extended")


@pytest.mark.parametrize("how", ["reset", "truncate", "renumber"])
def test_a_stale_result_is_dropped(how: str) -> None:
    store = KeyStore(DIM)
    retriever = HeldRetriever(DIM, min_index_size=100)
    retriever.use_store(store)

    def add(keys: Tensor) -> None:
        store.append(keys)
        retriever.add(keys)

    old, new = numbers(200), numbers(300, seed=5)
    add(old)
    check(retriever, old)
    assert Held.begun.wait(30)
    if how == "reset":
        store.reset()
        retriever.reset()
        now = new
    elif how == "truncate":
        store.truncate([50])
        now = torch.cat((old[:, :50], new), 1)
    else:
        store.keep([torch.arange(200) % 2 == 0])
        retriever.renumber()
        now = torch.cat((old[:, ::2], new), 1)
    add(new)
    Held.door.set()
    check(retriever, now)
    retriever.flush()
    assert int(retriever.indexed[0]) == now.shape[1]
    check(retriever, now)


def test_keys_taken_back_untold_take_the_index_and_removals_with_them() -> None:
    store = KeyStore(DIM)
    retriever = create_retriever({"name": "hnsw", "min_index_size": 50, "num_threads": 1, "build": "blocking"}, dim=DIM)
    retriever.use_store(store)
    old, new = numbers(200), numbers(200, seed=3)
    store.append(old)
    retriever.add(old)
    retriever.flush()
    retriever.remove([torch.arange(150, 200)])
    store.truncate([150])
    store.append(new)
    retriever.add(new)
    keys = torch.cat((old[:, :150], new), 1)
    queries = numbers(6, seed=99)
    scores = queries @ keys.transpose(1, 2)
    rows = retriever.search(queries, 20)
    torch.testing.assert_close(scores.gather(2, rows), scores.topk(20, dim=2).values)


def test_a_build_that_fails_is_counted_and_warned_of_and_searched_exactly() -> None:
    Held.error = MemoryError("no room")
    retriever, keys = building()
    Held.door.set()
    with pytest.warns(RuntimeWarning, match="no room"):
        retriever.flush()
    check(retriever, keys)
    assert (retriever.stats().fallbacks, int(retriever.indexed[0])) == (1, 0)


def test_an_extension_that_fails_takes_the_index_out_of_use() -> None:
    Held.door.set()
    retriever, keys = building()
    retriever.flush()
    Held.error = ValueError("broken on purpose")
    retriever.add(numbers(60, 1))
    keys = torch.cat((keys, numbers(60, 1)), 1)
    with pytest.warns(RuntimeWarning, match="broken on purpose"):
        retriever.flush()
    assert int(retriever.indexed[0]) == 0
    check(retriever, keys)


def test_a_missing_library_is_an_error_of_the_caller() -> None:
    class Lacking(PerBankRetriever):
        def new_index(self, dim: int) -> Held:
            raise SettingError("M", 1, "is bad", "Correct it.")

    retriever = Lacking(DIM, min_index_size=10)
    retriever.add(numbers(50))

    def search_until_built() -> None:
        for _ in range(2000):
            retriever.search(numbers(1), 3)
            threading.Event().wait(0.005)

    with pytest.raises(SettingError, match="is bad"):
        search_until_built()


def test_forks_share_a_build_under_way() -> None:
    retriever, keys = building()
    twin = retriever.fork()
    twin.add(numbers(10, 1))
    Held.door.set()
    retriever.flush()
    check(twin, torch.cat((keys, numbers(10, 1)), 1))
    check(retriever, keys)
    assert twin.indexed.tolist() == retriever.indexed.tolist() == [200]
    assert (retriever.stats().rebuilds, twin.stats().rebuilds) == (1, 0)


@pytest.mark.parametrize("more", [0, 40])
def test_what_one_fork_added_since_is_not_in_the_shared_build_of_the_other(more: int) -> None:
    """The first to take a build that both wait for must not extend it: the second takes it later."""
    retriever, keys = building()
    twin, mine, theirs = retriever.fork(), numbers(40, 1), numbers(more, 2)
    Held.door.set()
    retriever.add(mine)
    retriever.flush()
    twin.add(theirs)
    check(twin, torch.cat((keys, theirs), 1))
    check(retriever, torch.cat((keys, mine), 1))


def test_a_build_that_two_banks_wait_for_is_not_extended_by_the_first_that_takes_it() -> None:
    """What the one bank got since must not be answered to the other."""
    old, keys = building()
    store = old.store.select([0, 0])
    twin = old.select([0, 0], store)
    assert twin is not None
    del old
    more = torch.cat((numbers(90, seed=1), numbers(90, seed=2)))
    store.append(more, lengths=[90, 1])
    twin.add(more, lengths=[90, 1])
    job = twin._jobs[0]
    assert job is not None
    assert job is twin._jobs[1]
    Held.door.set()
    job.finish()
    queries = torch.cat((numbers(6, seed=99), more[1:, :1].expand(-1, 6, -1)))
    for _ in range(2):  # the first takes it into use and may begin to extend it
        rows = twin.search(queries, 5)
        for bank, count in enumerate((290, 201)):
            scores = queries[bank] @ torch.cat((keys[0], more[bank]))[:count].T
            torch.testing.assert_close(scores.gather(1, rows[bank]), scores.topk(5, dim=1).values)
        for waiting in list(twin._jobs):
            if waiting is not None:
                waiting._done.wait(30)


def test_a_build_that_a_fork_no_longer_waits_for_is_extended_in_place() -> None:
    retriever, keys = building()
    twin, gone = retriever.fork(), retriever.fork()
    Held.door.set()
    twin.reset()
    del gone
    retriever.add(numbers(40, 1))
    retriever.flush()
    check(retriever, torch.cat((keys, numbers(40, 1)), 1))
    assert retriever.stats().rebuilds == 1


def test_a_retriever_that_builds_pickles_and_saves(tmp_path: Any) -> None:
    retriever, keys = building()
    copy = pickle.loads(pickle.dumps(retriever))
    retriever.save(tmp_path)
    other = HeldRetriever(DIM, min_index_size=100)
    other.load(tmp_path)
    Held.door.set()
    for each in (copy, other):
        each.flush()
        check(each, keys)
        assert int(each.indexed[0]) == 200


def test_a_dropped_retriever_calls_its_waiting_build_off() -> None:
    first, _ = building()
    second = HeldRetriever(DIM, min_index_size=100)
    second.add(numbers(150))
    second.search(numbers(1), 3)
    Held.begun.clear()
    del second
    Held.door.set()
    first.flush()
    assert not Held.begun.wait(0.05)


def test_blocking_builds_in_the_search() -> None:
    Held.door.set()
    retriever = HeldRetriever(DIM, min_index_size=100, build="blocking")
    retriever.add(numbers(200))
    retriever.search(numbers(1), 3)
    assert int(retriever.indexed[0]) == 200
    with pytest.raises(SettingError, match="background or blocking"):
        HeldRetriever(DIM, build="later")


_SCRIPT = """
import os, sys, threading, torch
torch.set_num_threads(1)
from lightning_fot.retrievers import create_retriever
assert threading.active_count() == 1
make = lambda: create_retriever({"name": "hnsw", "min_index_size": 100, "num_threads": 1, "M": 64,
    "ef_construction": 500}, dim=32)
retriever = make()
keys = torch.randn(1, 60000, 32)
retriever.add(keys)
other = make()
other.add(keys)
query = keys[:, :1] * 10
want = (query @ keys.transpose(1, 2)).topk(5).indices.tolist()
assert retriever.search(query, 5).tolist() == want
assert other.search(query, 5).tolist() == want
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt"])
def test_the_process_ends_while_an_index_is_built(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT + end], capture_output=True, text=True, timeout=PATIENCE_S)
    assert bool(done.returncode) == bool(end), done.stderr
    assert "Fatal" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_wait_for_the_thread_it_lacks() -> None:
    script = (
        _SCRIPT.replace("60000", "3000")
        + """
child = os.fork()
if not child:
    assert retriever.search(query, 5).tolist() == want
    retriever.flush()
    assert int(retriever.indexed[0]) == 3000
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
