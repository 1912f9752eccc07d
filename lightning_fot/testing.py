"""The contract suite for retrievers: what a plug-in must hold to serve as a memory's index.

A plug-in's test file needs three lines::

    from lightning_fot.testing import RetrieverContract

    class TestMine(RetrieverContract):
        retriever = "mine"
"""

from __future__ import annotations

import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from time import monotonic, sleep
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_fot.bench.measure import load_qk, measure_retriever
from lightning_fot.errors import SettingError
from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.keys.scan import topk_rows
from lightning_fot.retrievers.registry import create_retriever


@cache
def real_qk() -> dict[str, dict[str, Tensor]]:
    """Keys and queries of two heads of SmolLM2-135M, shipped with the package.

    Returns:
        ``L10h0`` and ``L20h1`` -> keys (1, 6144, 64), queries (1, 256, 64), past_queries (1, 1024, 64), float32.
        Keys are un-rotated, queries rotated by their local position. ``L20h1`` holds the attention sinks.
    """
    with as_file(files("lightning_fot") / "testing_qk.npz") as path:
        return load_qk(path)


class RetrieverContract:
    """Subclass it, set ``retriever``, and let pytest collect it.

    Attributes:
        retriever: Name, ``{"name": name, **arguments}``, class path, class or factory.
        min_mass_recall: Least share of the exact top-32's softmax mass that must be found on real keys.
        repeatable: Whether two builds with one seed and one thread give equal rows; False where the library cannot.
        index_from: Keys a bank from which the index is used in these tests; the product's default is 16384.
    """

    retriever: ClassVar[Any]
    min_mass_recall: ClassVar[float] = 0.95
    index_from: ClassVar[int] = 256
    repeatable: ClassVar[bool] = True

    def make(self, dim: int = 64, banks: int = 1, **kwargs: Any) -> Retriever:
        """A retriever with one thread, so that graphs built twice are the same."""
        spec = type(self).__dict__.get("retriever", type(self).retriever)
        return create_retriever(
            spec, dim=dim, banks=banks, **{"min_index_size": self.index_from, "num_threads": 1, **kwargs}
        )

    def filled(self, n: int = 2048, banks: int = 1, **kwargs: Any) -> tuple[Retriever, Tensor, Tensor]:
        """A retriever with n real keys a bank, those keys (banks, n, 64) and real queries (banks, 256, 64)."""
        heads = [real_qk()["L10h0"], real_qk()["L20h1"]]
        keys = torch.cat([heads[bank % 2]["keys"][:, bank * 64 : bank * 64 + n] for bank in range(banks)])
        queries = torch.cat([heads[bank % 2]["queries"] for bank in range(banks)])
        retriever = self.make(banks=banks, **kwargs)
        retriever.observe(torch.cat([heads[bank % 2]["past_queries"] for bank in range(banks)]))
        retriever.add(keys)
        retriever.flush()
        return retriever, keys, queries

    def check_rows(self, rows: Tensor, lengths: list[int], k: int) -> None:
        """Rows (banks, q, k): int64, in range, without duplicates, missing ones -1."""
        assert rows.dtype == torch.int64
        assert rows.shape[2] == k
        for bank, length in enumerate(lengths):
            assert int(rows[bank].min()) >= -1
            assert int(rows[bank].max()) < length
            for line in rows[bank].tolist():
                real = [row for row in line if row >= 0]
                assert len(set(real)) == len(real)

    def overlap(self, rows: Tensor, keys: Tensor, queries: Tensor) -> float:
        """Share of the exact neighbours in rows (banks, q, k)."""
        hits = 0
        for bank in range(rows.shape[0]):
            exact, _ = topk_rows(queries[bank].float(), keys[bank], rows.shape[2])
            hits += int((rows[bank].unsqueeze(2) == exact.unsqueeze(1)).any(dim=2).sum())
        return hits / rows.numel()

    def check_same(self, rows: Tensor, others: Tensor) -> None:
        """Two builds agree: on each row where the backend is repeatable, on most otherwise."""
        if self.repeatable:
            assert torch.equal(rows, others)
        else:
            # Of two builds either may miss what the other finds: some find 95 of 100, and so agree on 90.
            assert float((rows.unsqueeze(3) == others.unsqueeze(2)).any(dim=3).float().mean()) > 0.8

    @pytest.mark.parametrize("head", ["L10h0", "L20h1"])
    def test_mass_recall_on_real_keys(self, head: str) -> None:
        qk = real_qk()[head]
        (row,) = measure_retriever(
            self.retriever,
            qk["keys"],
            qk["queries"],
            qk["past_queries"],
            k=32,
            query_grid=[{}],
            repeats=1,
            min_index_size=self.index_from,
            num_threads=1,
        )
        assert row["index_used"]
        assert row["mass_recall"] >= self.min_mass_recall

    def test_an_index_answers_and_never_falls_back(self) -> None:
        retriever, _, queries = self.filled()
        retriever.search(queries, 32)
        assert retriever.exact or int(retriever.indexed.min()) == 2048
        assert retriever.stats().fallbacks == 0

    @pytest.mark.parametrize("n", [1, 5, 300])
    def test_k_above_the_number_of_keys(self, n: int) -> None:
        retriever, _, queries = self.filled(n)
        rows = retriever.search(queries[:, :4], n + 3)
        self.check_rows(rows, [n], n + 3)
        assert all(sorted(line) == [-1] * 3 + list(range(n)) for line in rows[0].tolist())

    def test_empty(self) -> None:
        retriever = self.make(banks=2)
        retriever.flush()
        assert retriever.search(torch.ones(2, 3, 64), 4).tolist() == [[[-1] * 4] * 3] * 2
        assert retriever.search(torch.ones(2, 0, 64), 4).shape == (2, 0, 4)
        assert retriever.lengths.tolist() == [0, 0]

    def test_duplicate_keys(self) -> None:
        retriever = self.make()
        retriever.add(torch.ones(1, 2 * self.index_from, 64))
        retriever.flush()
        self.check_rows(retriever.search(torch.ones(1, 2, 64), 16), [2 * self.index_from], 16)

    def test_huge_key(self) -> None:
        retriever, keys, queries = self.filled()
        huge = 1000 * queries[:, :1]
        retriever.reset()
        every = torch.cat((keys[:, :1000], huge, keys[:, 1000:]), dim=1)
        retriever.add(every)
        retriever.flush()
        rows = retriever.search(queries, 32)
        assert 1000 in rows[0, 0].tolist()
        self.check_rows(rows, [2049], 32)
        assert self.overlap(rows, every, queries) > 0.7

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        _, keys, queries = self.filled()
        retriever = self.make()
        retriever.add(keys.to(dtype))
        rows = retriever.search(queries.to(dtype), 8)
        self.check_rows(rows, [2048], 8)
        assert self.overlap(rows, keys.to(dtype), queries.to(dtype)) > 0.6

    def test_layout_of_input_does_not_matter(self) -> None:
        retriever, keys, queries = self.filled(banks=2)
        other = self.make(banks=2)
        heads = [real_qk()["L10h0"], real_qk()["L20h1"]]
        other.observe(torch.cat([head["past_queries"] for head in heads]).transpose(1, 2).contiguous().transpose(1, 2))
        other.add(keys.transpose(0, 1).contiguous().transpose(0, 1))
        other.flush()
        strided = queries.repeat_interleave(2, dim=2)[..., ::2]
        assert not strided.is_contiguous()
        self.check_same(retriever.search(queries, 8), other.search(strided, 8))

    def test_ragged_banks(self) -> None:
        _, keys, queries = self.filled(banks=3)
        retriever = self.make(banks=3)
        retriever.add(keys, torch.tensor([2048, 0, 700]))
        retriever.add(keys[:, :10], torch.tensor([0, 10, 10]))
        retriever.flush()
        assert retriever.lengths.tolist() == [2048, 10, 710]
        rows = retriever.search(queries, 16)
        self.check_rows(rows, [2048, 10, 710], 16)
        assert (rows[1] >= 0).sum(dim=1).tolist() == [10] * 256

    def test_new_keys_are_found_at_once(self) -> None:
        retriever, _, queries = self.filled(1024)
        for step in range(12):
            loud = 100 * queries[:, step : step + 1]
            retriever.add(loud.expand(-1, 1 + 40 * step, -1) * torch.linspace(1, 0.01, 1 + 40 * step).view(1, -1, 1))
            newest = int(retriever.lengths[0]) - (1 + 40 * step)
            rows = retriever.search(queries[:, step : step + 1], 64)
            self.check_rows(rows, retriever.lengths.tolist(), 64)
            assert newest in rows[0, 0].tolist()

    def test_reset(self) -> None:
        retriever, keys, queries = self.filled(banks=2)
        before = retriever.search(queries, 8)
        retriever.reset([0])
        assert retriever.lengths.tolist() == [0, 2048]
        rows = retriever.search(queries, 8)
        assert int(rows[0].max()) == -1
        assert torch.equal(rows[1], before[1])
        retriever.reset()
        retriever.add(keys[:, :20])
        self.check_rows(retriever.search(queries, 30), [20, 20], 30)

    def test_fork(self) -> None:
        retriever, keys, queries = self.filled()
        before = retriever.search(queries, 8)
        twin = retriever.fork()
        retriever.add(100 * queries)
        twin.add(keys[:, :3] * 0.01)
        assert (retriever.lengths.tolist(), twin.lengths.tolist()) == ([2304], [2051])
        assert int(retriever.search(queries, 8).max()) >= 2048
        assert torch.equal(twin.search(queries, 8).clamp_max(2048), before)
        retriever.flush()
        retriever.reset()
        assert torch.equal(twin.search(queries, 8).clamp_max(2048), before)

    @pytest.mark.parametrize("share", [0.05, 0.9])
    def test_removed_rows_are_never_returned(self, share: float) -> None:
        retriever, keys, queries = self.filled(banks=2)
        gone = (torch.rand(2048, generator=torch.Generator().manual_seed(0)) < share).nonzero()[:, 0]
        retriever.remove([gone, None])
        rows = retriever.search(queries, 32)
        self.check_rows(rows, [2048, 2048], 32)
        assert not bool(torch.isin(rows[0], gone).any())
        assert int((rows[0] >= 0).sum()) == 32 * 256
        left = torch.ones(2048, dtype=torch.bool).index_fill(0, gone, False).nonzero()[:, 0]
        exact = left[topk_rows(queries[0], keys[0][left], 32)[0]]
        assert float((rows[0].unsqueeze(2) == exact.unsqueeze(1)).any(2).float().mean()) > 0.7
        assert bool(torch.isin(rows[1], gone).any())
        retriever.remove([left, None])
        assert int(retriever.search(queries, 4)[0].max()) == -1

    def test_chosen_banks(self) -> None:
        retriever, _, queries = self.filled(banks=2)
        store = retriever.store.select([1, 1, 0])
        chosen = retriever.select([1, 1, 0], store)
        if chosen is None:  # it keeps keys of its own
            return
        before = retriever.search(queries, 8)
        assert torch.equal(chosen.search(queries[[1, 1, 0]], 8), before[[1, 1, 0]])
        loud = 100 * queries[[1, 1, 0], :1]
        store.append(loud)
        chosen.add(loud)
        chosen.flush()
        assert (chosen.search(queries[[1, 1, 0], :1], 1) == 2048).all()
        assert torch.equal(retriever.search(queries, 8), before)

    def test_save_and_load(self, tmp_path: Path) -> None:
        retriever, keys, queries = self.filled(banks=2)
        retriever.save(tmp_path / "saved")
        other = self.make(banks=2)
        other.load(tmp_path / "saved")
        other.flush()
        assert other.lengths.tolist() == [2048, 2048]
        rows = other.search(queries, 16)
        self.check_rows(rows, [2048, 2048], 16)
        assert self.overlap(rows, keys, queries) > 0.7

    def test_pickle(self) -> None:
        retriever, keys, queries = self.filled()
        other = pickle.loads(pickle.dumps(retriever))
        rows = other.search(queries, 16)
        self.check_rows(rows, [2048], 16)
        assert self.overlap(rows, keys, queries) > 0.7

    def test_deterministic(self) -> None:
        (first, _, queries), (second, _, _) = self.filled(), self.filled()
        assert torch.equal(first.search(queries, 16), first.search(queries, 16))
        self.check_same(first.search(queries, 16), second.search(queries, 16))

    def test_threads(self) -> None:
        threads = torch.get_num_threads()
        retriever, _, queries = self.filled(num_threads=2)
        assert torch.get_num_threads() == threads
        want = retriever.search(queries, 8)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: retriever.search(queries, 8), range(8)))
        assert torch.get_num_threads() == threads
        assert all(torch.equal(rows, want) for rows in answers)

    def test_indexes_are_built_beside_the_caller(self) -> None:
        retriever, keys, queries = self.filled(1024)
        for start in range(1024, 4096, 256):
            window = real_qk()["L10h0"]["keys"][:, start : start + 256]
            retriever.add(window)
            keys = torch.cat((keys, window), dim=1)
            rows = retriever.search(queries[:, :8], 16)
            self.check_rows(rows, [keys.shape[1]], 16)
            assert self.overlap(rows, keys, queries[:, :8]) > 0.6
        retriever.flush()
        assert retriever.exact or retriever.indexed.tolist() == [4096]
        assert retriever.stats().fallbacks == 0
        assert self.overlap(retriever.search(queries, 16), keys, queries) > 0.7

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_process_searches(self) -> None:
        retriever, _, queries = self.filled()
        want = retriever.search(queries[:, :8], 8)
        child = os.fork()
        if not child:
            # Nothing may leave this branch but by the exit, or pytest would go on twice.
            try:
                torch.set_num_threads(1)
                os._exit(0 if torch.equal(retriever.search(queries[:, :8], 8), want) else 3)
            finally:
                os._exit(4)
        until = monotonic() + 30
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if monotonic() > until:
                os.kill(child, signal.SIGKILL)
                until = float("inf")
            sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == 0

    def test_query_arguments(self) -> None:
        retriever, _, queries = self.filled()
        retriever.search(queries, 8)
        rebuilds = retriever.stats().rebuilds
        for name in retriever.query_args:
            value = getattr(retriever, name)
            retriever.set_query_args(**{name: 64 if value is None else value})
        self.check_rows(retriever.search(queries, 8), [2048], 8)
        assert retriever.stats().rebuilds == rebuilds
        with pytest.raises(SettingError, match="no_such_setting"):
            retriever.set_query_args(no_such_setting=1)

    def test_bad_input_is_named(self) -> None:
        retriever, keys, queries = self.filled(100)
        bad = keys.clone()
        bad[0, 5, 5] = float("nan")
        for name, call in (
            ("keys", lambda: retriever.add(bad)),
            ("keys", lambda: retriever.add(keys[..., :8])),
            ("lengths", lambda: retriever.add(keys, torch.tensor([101]))),
            ("queries", lambda: retriever.search(queries * float("inf"), 4)),
            ("queries", lambda: retriever.search(queries[..., :8], 4)),
            ("queries", lambda: retriever.search(queries.long(), 4)),
            ("queries", lambda: retriever.search(queries[0], 4)),
            ("queries", lambda: retriever.observe(queries * float("nan"))),
            ("keys", lambda: retriever.add(keys.long())),
            ("keys", lambda: retriever.add(keys * float("inf"))),
            ("lengths", lambda: retriever.add(keys, torch.tensor([-1]))),
            ("rows", lambda: retriever.remove([torch.tensor([100])])),
            ("rows", lambda: retriever.remove([torch.tensor([-1])])),
            ("banks", lambda: retriever.reset([1])),
            ("k", lambda: retriever.search(queries, 0)),
            ("k", lambda: retriever.search(queries, -3)),
            ("k", lambda: retriever.search(queries, True)),
        ):
            with pytest.raises(SettingError, match=name):
                call()
        assert retriever.lengths.tolist() == [100]
        # Large enough for their sum to overflow, and finite all the same.
        assert retriever.search(torch.full((1, 1, 64), 3e37), 4).shape == (1, 1, 4)

    def test_unknown_argument_is_named(self) -> None:
        with pytest.raises(SettingError, match="no_such_argument"):
            self.make(no_such_argument=1)

    @pytest.mark.parametrize(
        "argument", [{"seed": -1}, {"num_threads": -1}, {"min_index_size": -1}, {"transform": "x"}, {"build": "later"}]
    )
    def test_bad_arguments_are_named(self, argument: dict[str, Any]) -> None:
        with pytest.raises(SettingError, match=next(iter(argument))):
            self.make(**argument)
