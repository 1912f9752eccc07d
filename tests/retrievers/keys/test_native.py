"""The compiled core: equal to brute force in float64 and to the torch code, for every kind of processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fot.retrievers import KeyStore
from lightning_fot.retrievers.exact import ExactRetriever
from lightning_fot.retrievers.index.answers import checked_rows, merged_few
from lightning_fot.retrievers.keys import native
from lightning_fot.retrievers.keys.codes import CodeBook
from lightning_fot.retrievers.keys.compiled import KINDS, compile_libraries, compiler, digest, library
from lightning_fot.retrievers.keys.scan import topk_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Where the libraries lie: beside their source if they are made of it, or newly compiled."""
    if all(library(kind).is_file() and not isinstance(native.load(library(kind)), str) for kind in KINDS):
        return None
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    fresh = tmp_path_factory.mktemp("native")
    assert compile_libraries(fresh) is None
    return fresh


@pytest.fixture(params=list(KINDS), scope="module")
def compiled(request: pytest.FixtureRequest, folder: Path | None) -> Iterator[Any]:
    """A library in use."""
    if not native.runs(request.param):
        pytest.skip(f"this processor is not {request.param}")
    loaded = native.load(library(request.param) if folder is None else library(request.param, folder))
    assert not isinstance(loaded, str), loaded
    patch = pytest.MonkeyPatch()
    patch.setattr(native, "library", lambda: loaded)
    yield loaded
    patch.undo()


def keys_of(kind: str, n: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, dim, generator=generator)
    if kind == "alike":
        keys = keys[torch.randint(0, min(3, n), (n,), generator=generator)]
    elif kind == "zero":
        keys[torch.randint(0, n, (n // 2 + 1,), generator=generator)] = 0
    elif kind == "sizes":
        keys *= 10.0 ** torch.randint(-20, 15, (n, 1), generator=generator)
    elif kind == "mean":
        keys += 30
    return keys


def assert_best(rows: Tensor, scores: Tensor, queries: Tensor, keys: Tensor, k: int, gone: Tensor | None) -> None:
    """Rows (q, k) and scores (q, k) are those of brute force in float64, but for what float32 rounds off."""
    exact = queries.double() @ keys.double().T
    if gone is not None:
        exact[:, : len(gone)].masked_fill_(gone, float("-inf"))
    best = exact.topk(k, dim=1).values
    there = best > float("-inf")
    assert torch.equal(rows >= 0, there)
    for line in rows.tolist():
        found = [row for row in line if row >= 0]
        assert len(set(found)) == len(found)
    mine = exact.gather(1, rows.clamp_min(0))
    sizes = queries.double().abs() @ keys.double().abs().T
    rounding = 1e-6 * (sizes.gather(1, rows.clamp_min(0)) + sizes.gather(1, exact.topk(k, dim=1).indices)) + 1e-37
    ordered = mine.masked_fill(~there, float("-inf"))
    assert bool(((ordered.sort(1, descending=True).values - best).abs() <= rounding)[there].all())
    assert bool(((scores.double() - mine).abs() <= rounding)[there].all())
    assert bool((scores[:, :-1] >= scores[:, 1:]).all())


CASES = st.tuples(
    st.sampled_from(["plain", "alike", "zero", "sizes", "mean"]),
    st.sampled_from([1, 3, 8, 16, 33, 64, 80, 100]),  # dim
    st.sampled_from([1, 2, 15, 16, 17, 511, 513, 1300]),  # keys
    st.sampled_from([1, 2, 3, 4, 5, 7, 13, 30]),  # queries
    st.integers(1, 40),  # k
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, 0.0, 0.3, 1.0]),  # share removed
    st.integers(0, 1000),
)


@settings(max_examples=25, deadline=None)
@given(case=CASES)
def test_every_key_scored(compiled: Any, case: tuple[Any, ...]) -> None:
    kind, dim, n, count, k, dtype, share, seed = case
    wide = (
        keys_of(kind, n, dim + 3, seed).clamp(-6e4, 6e4) if dtype == torch.float16 else keys_of(kind, n, dim + 3, seed)
    )
    keys, k = wide.to(dtype)[:, :dim], min(k, n)
    generator = torch.Generator().manual_seed(seed + 1)
    queries = torch.randn(count, dim, generator=generator)
    # Some rows are removed, and those behind the mask are not.
    gone = None if share is None else torch.rand(n // 2 + 2, generator=generator) < share
    start = 0 if gone is None else 2
    rows, scores = native.scan(queries, keys, k, None, gone, start)
    assert_best(rows, scores, queries, keys, k, None if gone is None else gone[start:][:n])
    reference = topk_in_torch(queries, keys, k)
    if gone is None and kind == "plain":
        assert torch.allclose(scores, reference[1], rtol=1e-5, atol=1e-5 * float(keys.float().norm(dim=1).max()))


def topk_in_torch(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return topk_rows(queries, keys, k)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["plain", "alike", "zero", "sizes", "mean"]),
    dim=st.sampled_from([1, 7, 16, 40, 64, 80]),
    n=st.sampled_from([1024, 2048, 2500, 5000]),
    count=st.integers(1, 3),
    k=st.integers(1, 16),
    share=st.sampled_from([None, 0.01, 0.6]),
    size=st.sampled_from([1e-30, 1.0, 1e5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_in_eight_bits_first(
    compiled: Any, kind: str, dim: int, n: int, count: int, k: int, share: float | None, size: float,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    keys = keys_of(kind, n, dim, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    queries = size * torch.randn(count, dim, generator=generator)
    gone = None if share is None else torch.rand(n - 5, generator=generator) < share
    coded = CodeBook().upto(keys)
    assert coded is not None
    rows, scores, unanswered = native.scan_coded(queries, coded, keys, k, n, gone)
    assert not unanswered
    assert_best(rows, scores, queries, keys, k, gone)


def test_too_many_alike_are_left_to_a_scan(compiled: Any) -> None:
    keys = torch.ones(8192, 16)
    coded = CodeBook().upto(keys)
    assert coded is not None
    assert native.scan_coded(torch.ones(2, 16), coded, keys, 4, 256, None)[2] == [0, 1]
    retriever = ExactRetriever(16)
    retriever.add(keys[None])
    assert retriever.search(torch.ones(1, 2, 16), 4).unique().numel() >= 4


@settings(max_examples=25, deadline=None)
@given(n=st.sampled_from([40, 700]), count=st.sampled_from([1, 3, 20]), k=st.integers(1, 9), seed=st.integers(0, 1000))
def test_stores_in_eight_bits(compiled: Any, n: int, count: int, k: int, seed: int) -> None:
    """Their scores are those of the decoded vectors."""
    store, retriever = KeyStore(24, 1, torch.int8), ExactRetriever(24)
    retriever.use_store(store)
    keys = keys_of("mean", n, 24, seed)[None]
    store.append(keys)
    retriever.add(keys)
    queries = torch.randn(1, count, 24, generator=torch.Generator().manual_seed(seed))
    rows = retriever.search(queries, k)[0]
    exact = queries[0].double() @ store.bank(0).double().T
    best = exact.topk(k, dim=1).values
    assert torch.allclose(exact.gather(1, rows).sort(1, descending=True).values, best, rtol=1e-5, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    count=st.sampled_from([1, 3, 130]), width=st.integers(1, 40), k=st.integers(1, 30), apart=st.integers(1, 50),
    tail=st.integers(0, 20), missing=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@example(count=130, width=1, k=12, apart=25, tail=10, missing=False, seed=68)  # rows 168 and 254: 1.1e-7 apart
def test_answers_are_merged(
    compiled: Any, count: int, width: int, k: int, apart: int, tail: int, missing: bool, seed: int
) -> None:
    """With rows set apart and rows found otherwise, as numpy does it."""
    generator = torch.Generator().manual_seed(seed)
    size, dim = 300, 12
    keys = torch.randn(size + tail, dim, generator=generator)
    queries = torch.randn(count, dim, generator=generator)
    answer = torch.stack([torch.randperm(size, generator=generator)[:width] for _ in range(count)]).numpy()
    if missing:
        answer[:, -1] = -1
    hidden_rows = torch.randperm(size, generator=generator)[:apart].sort().values
    hidden = np.zeros(size, dtype=np.bool_)
    hidden[hidden_rows.numpy()] = True
    others = None
    if tail:
        rows, scores = topk_rows(queries, keys[size:], min(k, tail))
        others = rows + size, scores
    beside = native.Apart(hidden, hidden_rows, keys[hidden_rows])
    found, problem = native.merge(queries, keys, answer, size, k, beside, others)
    assert problem is None
    for query in range(count):
        shown = {row for row in answer[query].tolist() if row >= 0} | set(hidden_rows.tolist())
        shown |= set(range(size, size + tail))
        exact = (keys.double() @ queries[query].double()).tolist()
        order = sorted(shown, key=lambda row, exact=exact: -exact[row])
        want, got = order[:k], found[query].tolist()
        assert got[len(want) :] == [-1] * (k - len(want))
        assert len(set(got[: len(want)]) & shown) == len(want)
        for row, best in zip(got, want, strict=False):
            # Two rows that float32 cannot tell apart may stand in either order.
            assert row == best or abs(exact[row] - exact[best]) < 2e-6
    if not tail and count <= 3 and k < apart + width - 1:
        same = merged_few(
            queries.numpy(), keys.numpy(), answer, hidden, hidden_rows.numpy(), keys[hidden_rows].numpy(), k
        )
        width = same.shape[1]
        there = found.numpy()[:, :width] >= 0
        assert np.array_equal(found.numpy()[:, :width][there], same[there])


@pytest.mark.parametrize(("bad", "said"), [(300, "outside -1 to 299"), (-2, "outside -1 to 299"), (7, "a row twice")])
def test_wrong_answers_are_told(compiled: Any, bad: int, said: str) -> None:
    answer = np.array([[3, 7, -1, -1], [3, 7, 1, bad]], dtype=np.int64)
    none = torch.zeros(0, dtype=torch.int64)
    keys, queries = torch.randn(300, 8), torch.randn(2, 8)
    flags = np.zeros(300, dtype=np.bool_)
    problem = native.merge(queries, keys, answer, 300, 3, native.Apart(flags, none, torch.zeros(0, 8)))[1]
    assert problem is not None
    assert said in problem
    assert problem == checked_rows(answer, 2, 4, 300)[1]


def test_sizes(compiled: Any) -> None:
    numbers = torch.randn(5, 7)
    assert native.sizes(numbers, 1e6) == 0
    assert native.sizes(torch.zeros(2, 7), 1e6) == 0
    for value in (1e7, -1e7):
        assert native.sizes(torch.cat((numbers, torch.full((1, 7), value))), 1e6) == 1
    assert native.sizes(torch.full((1, 7), 1e-9), 1e6) == 1
    for value in (float("nan"), float("inf"), -float("inf")):
        numbers[3, 6] = value
        assert native.sizes(numbers, 1e6) == 2


def test_threads_share_a_search(compiled: Any) -> None:
    """Queries among them where there are many, keys where there are few: the same rows either way."""
    keys, queries = torch.randn(6000, 32), torch.randn(60, 32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([native.scan(queries[:count], keys, 5, None, None, 0)[0] for count in (1, 7, 60)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_library_of_another_source_is_not_used(folder: Path | None, tmp_path: Path) -> None:
    kind = next(iter(KINDS))
    content = (library(kind) if folder is None else library(kind, folder)).read_bytes()
    (tmp_path / "other.so").write_bytes(content.replace(digest().encode(), b"0" * 16))
    assert native.load(tmp_path / "other.so") == "it was made of another source"
    (tmp_path / "broken.so").write_bytes(b"nothing")
    assert isinstance(native.load(tmp_path / "broken.so"), str)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("compiled")
def test_what_callers_have_for_a_default_dtype_is_not_what_the_library_writes_into(default: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1500, 16, generator=generator)
    queries = torch.randn(32, 16, generator=generator)
    wanted = (queries.double() @ keys.double().T).topk(8)
    torch.set_default_dtype(default)
    try:
        rows, scores = topk_rows(queries, keys, 8)
        few = ExactRetriever(16)
        few.add(keys[None])
        found = few.search(queries[None, :2], 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rows, wanted.indices)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted.values.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], wanted.indices[:2])
