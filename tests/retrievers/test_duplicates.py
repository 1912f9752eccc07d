"""Keys that are nearly the same: grouped as a slow loop groups them, and no longer in the way of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.retrievers import Retriever, create_retriever
from lightning_fot.retrievers.duplicates import Groups, find_duplicates
from lightning_fot.testing import real_qk


def repeated(kinds: int, copies: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randn(kinds, 16, generator=generator)
    order = torch.randperm(kinds * copies, generator=generator)
    return (kind.repeat(copies, 1) + noise * torch.randn(kinds * copies, 16, generator=generator))[order]


@pytest.mark.parametrize(("kinds", "copies", "noise"), [(1, 3000, 0.0), (40, 60, 0.01), (900, 4, 0.001), (2, 2, 0.0)])
def test_groups_hold_every_row_once_and_only_what_is_alike(kinds: int, copies: int, noise: float) -> None:
    vectors = repeated(kinds, copies, noise)
    groups = find_duplicates(vectors, 0.1)
    assert groups is not None
    assert sorted(groups.members.tolist()) == list(range(len(vectors)))
    assert groups.counts.sum() == len(vectors)
    for first, start, count in zip(groups.first, groups.starts, groups.counts, strict=True):
        rows = groups.members[start : start + count]
        assert rows[0] == first
        assert bool(((vectors[rows] - vectors[first]).square().sum(dim=1) <= 0.1 + 1e-4).all())
    # Kinds are far apart: whoever has the same kind is in the same group, but for those at the edge of two cells.
    assert kinds <= len(groups.first) <= kinds + kinds // 10


def test_text_that_does_not_repeat_itself_is_left_alone() -> None:
    keys = real_qk()["L20h1"]["keys"][0].float()
    spread = float((keys - keys.mean(dim=0)).square().sum(dim=1).median())
    assert find_duplicates(keys, 0.002 * spread) is None
    assert find_duplicates(keys[:1].repeat(500, 1), 0.0) is None
    assert find_duplicates(keys[:1], 1.0) is None
    # One in ten: a sample sees them, and they are too few to be worth it.
    assert find_duplicates(torch.cat((keys[:4000], keys[:1].repeat(400, 1))), 0.002 * spread) is None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rows_of_groups_are_those_of_a_loop(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    k = data.draw(st.integers(1, len(counts)))
    chosen = data.draw(st.lists(st.permutations([*range(len(counts)), -1]), min_size=0, max_size=4))
    members = data.draw(st.permutations(range(sum(counts))))
    starts = np.cumsum([0, *counts[:-1]])
    groups = Groups(np.asarray(members)[starts], np.asarray(members), starts, np.asarray(counts))
    found = groups.rows(np.asarray([line[:k] for line in chosen], dtype=np.int64).reshape(-1, k), k)
    want = []
    for line in chosen:
        rows = [row for group in line[:k] if group >= 0 for row in members[starts[group] :][: min(counts[group], k)]]
        want.append(rows[: 8 * k])
    assert k <= found.shape[1] <= 8 * k
    assert [[row for row in line if row >= 0] for line in found.tolist()] == want


def filler_and_needles() -> tuple[Tensor, Tensor, Tensor]:
    """Keys (1, n, 64) of which most repeat 30 others, queries (1, q, 64), and how each may be told from the others."""
    qk = real_qk()["L20h1"]
    generator = torch.Generator().manual_seed(3)
    own = qk["keys"][:, :200]
    spread = float((own - own.mean(dim=1, keepdim=True)).square().sum(dim=2).median())
    copies = own[:, :30].repeat(1, 200, 1)
    noise = 0.01 * (spread / 64) ** 0.5 * torch.randn(copies.shape, generator=generator)
    return torch.cat((copies + noise, own[:, 30:]), 1), qk["queries"], qk["past_queries"]


def share_found(retriever: Retriever, keys: Tensor, queries: Tensor, k: int = 32) -> Tensor:
    """Softmax mass (q,) of the rows found, over that of the true best."""
    weights = (queries[0] @ keys[0].T / 8).softmax(dim=1)
    rows = retriever.search(queries, k)[0]
    assert bool((rows >= 0).all())
    assert all(len(set(line)) == k for line in rows.tolist())
    return weights.gather(1, rows).sum(dim=1) / weights.topk(k, dim=1).values.sum(dim=1)


def filled(keys: Tensor, past: Tensor, **arguments: Any) -> Retriever:
    spec = {"name": "hnsw", "ef_search": 32, "min_index_size": 256, "build": "blocking", "num_threads": 1, **arguments}
    retriever = create_retriever(spec, dim=64)
    retriever.observe(past)
    retriever.add(keys)
    retriever.flush()
    return retriever


def test_a_graph_finds_what_stands_alone_among_duplicates() -> None:
    keys, queries, past = filler_and_needles()
    whole, grouped = filled(keys, past, duplicate_distance=0), filled(keys, past)
    lost = share_found(whole, keys, queries)
    found = share_found(grouped, keys, queries)
    assert float(lost.min()) < 0.7
    assert float(found.min()) > 0.9
    assert float(found.mean()) > float(lost.mean())
    assert grouped.stats().fallbacks == 0
    assert grouped.nbytes < 0.6 * whole.nbytes  # of which the keys themselves are a third
    # The same for a query alone, which takes another way.
    alone = torch.cat([share_found(grouped, keys, queries[:, [row]]) for row in range(8)])
    torch.testing.assert_close(alone, found[:8], rtol=1e-3, atol=1e-3)


def test_a_large_mean_makes_no_duplicates() -> None:
    keys, queries = real_qk()["L20h1"]["keys"], real_qk()["L20h1"]["queries"]
    far = keys + 100 * keys.mean(dim=1, keepdim=True)
    retriever = filled(far, queries, transform="none", ef_search=256)
    # Indexed as they are: the graph is as large as one that was told to take them all.
    assert retriever.nbytes == filled(far, queries, transform="none", duplicate_distance=0).nbytes


def test_groups_are_made_anew_when_a_bank_grows() -> None:
    keys, queries, past = filler_and_needles()
    retriever = filled(keys[:, :3000], past)
    shares = []
    for start in range(3000, keys.shape[1], 200):
        retriever.add(keys[:, start : start + 200])
        shares.append(share_found(retriever, keys[:, : start + 200], queries).min())
    assert min(shares) > 0.9
    assert 2 <= retriever.stats().rebuilds <= 10
    assert int(retriever.indexed[0]) > 3000


@pytest.mark.parametrize("value", [-0.1, 1.5, "many", True])
def test_a_distance_that_cannot_work_is_refused(value: Any) -> None:
    with pytest.raises(SettingError, match="duplicate_distance"):
        create_retriever({"name": "hnsw", "duplicate_distance": value}, dim=8)
