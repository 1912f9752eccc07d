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
from lightning_fot.retrievers import PerBankRetriever, Retriever, create_retriever
from lightning_fot.retrievers.index.duplicates import Groups, find_duplicates, reach
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
    starts = np.cumsum(groups.counts) - groups.counts
    for first, start, count in zip(groups.first, starts, groups.counts, strict=True):
        rows = groups.members[start : start + count]
        assert rows[0] == first
        assert bool(((vectors[rows] - vectors[first]).square().sum(dim=1) <= 0.1 + 1e-4).all())
    # Kinds are far apart: whoever has the same kind is in the same group, but for those at the edge of two cells.
    assert kinds <= len(groups.first) <= kinds + kinds // 10


def test_text_that_does_not_repeat_itself_is_left_alone() -> None:
    keys = real_qk()["L20h1"]["keys"][0].float()
    spread = float((keys - keys.mean(dim=0)).square().sum(dim=1).median())
    assert find_duplicates(keys, 0.002 * spread) is None
    assert find_duplicates(keys, reach(keys, 0.0008)) is None
    assert find_duplicates(keys[:1].repeat(500, 1), 0.0) is None
    assert find_duplicates(keys[:1], 1.0) is None
    # One in ten: a sample sees them, and they are too few to be worth it.
    assert find_duplicates(torch.cat((keys[:4000], keys[:1].repeat(400, 1))), 0.002 * spread) is None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rows_of_groups_are_those_of_a_loop(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=12))
    m, k = data.draw(st.integers(1, len(counts))), data.draw(st.integers(1, 40))
    chosen = data.draw(st.lists(st.permutations([*range(len(counts)), -1]), min_size=0, max_size=4))
    members = np.random.default_rng(len(counts)).permutation(sum(counts))
    starts = np.cumsum([0, *counts[:-1]])
    groups = Groups(members[starts], members, np.asarray(counts), 0.0, None)
    asked = np.asarray([line[:m] for line in chosen], dtype=np.int64).reshape(-1, m)
    want = [
        [int(members[starts[group] + place]) for group in line[:m] if group >= 0 for place in range(counts[group])]
        for line in chosen
    ]
    assert [[row for row in line if row >= 0] for line in groups.rows(asked).tolist()] == want
    # Without slack: the groups of the best firsts that make k rows, and those that score as the last of them.
    scores = -np.tile(np.arange(m, dtype=np.float32) // 2, (len(asked), 1))
    for line, kept in zip(asked.tolist(), groups.reaching(asked, scores, 0.0, k).tolist(), strict=True):
        total, least = 0, float("-inf")
        for place, group in enumerate(line):
            total += counts[group] if group >= 0 else 0
            if total >= k:
                least = scores[0, place]
                break
        assert kept == [group if scores[0, place] >= least else -1 for place, group in enumerate(line)]


def mixture(kind: str, generator: torch.Generator) -> Tensor:
    """Keys (1, 3000, 16): clusters, scales and outliers that were told apart by nothing but distances."""
    keys = torch.randn(3000, 16, generator=generator)
    if kind == "half far":
        keys[1500:] += 100 * torch.randn(16, generator=generator)
    elif kind == "half farther":
        keys[1500:] += 300 * torch.randn(16, generator=generator)
    elif kind == "a tenth far":
        keys[2700:] *= 100
    elif kind == "tight clusters":
        keys = 0.01 * keys + torch.randn(10, 16, generator=generator).repeat(300, 1)
    elif kind == "scales":
        keys *= 10 ** (4 * torch.rand(3000, 1, generator=generator) - 2)
    elif kind == "outliers":
        keys[:20] *= 1e6
    elif kind == "filler":
        keys = 0.001 * keys + torch.randn(30, 16, generator=generator).repeat(100, 1)
        keys[:100] = torch.randn(100, 16, generator=generator)
    elif kind == "filler and a far cloud":
        keys[:1500] = 0.001 * keys[:1500] + torch.randn(30, 16, generator=generator).repeat(50, 1)
        keys[1500:] += 100 * torch.randn(16, generator=generator)
    order = torch.randperm(3000, generator=generator)
    return keys[order][None]


def recalls(keys: Tensor, queries: Tensor, step: int) -> list[float]:
    """Of the 16 best, without groups and with them, where keys come by so many at a time."""
    true = queries[0] @ keys[0].T
    least = true.topk(16, dim=1).values[:, -1:] - 1e-5 * true.abs().amax(dim=1, keepdim=True)
    found = []
    for distance in (0.0, None):
        spec = {"name": "hnsw", "min_index_size": 256, "build": "blocking", "num_threads": 1, "ef_search": 64,
                "duplicate_distance": distance}  # fmt: skip
        retriever = create_retriever(spec, dim=16)
        for part in torch.split(keys, step, dim=1):
            retriever.add(part)
            retriever.flush()
        rows = retriever.search(queries, 16)[0]
        assert retriever.indexed.tolist() == [keys.shape[1]]
        found.append(float((true.gather(1, rows) >= least).float().mean()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        (kind, 7)
        for kind in ("half far", "half farther", "a tenth far", "tight clusters", "scales", "outliers", "filler")
    ]
    + [("half far", 102), ("filler and a far cloud", 100), ("filler and a far cloud", 103)],
)
def test_grouping_costs_no_recall_on_any_mixture(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = mixture(kind, generator)
    recall = recalls(keys, torch.randn(1, 100, 16, generator=generator), len(keys[0]))
    assert recall[1] >= recall[0] - 0.01, recall
    # Scales that differ by ten thousand are hard for a graph, with groups or without.
    assert recall[1] >= 0.9 or kind == "scales", recall


@pytest.mark.slow
@pytest.mark.parametrize("new", ["kinds", "cloud"])
def test_keys_of_another_scale_that_come_later_are_not_taken_for_duplicates(new: str) -> None:
    generator = torch.Generator().manual_seed(11)
    kinds = 10 * torch.randn(30, 16, generator=generator)
    if new == "cloud":
        kinds += 100 * torch.eye(16)[0]
    known = kinds.repeat(40, 1) + 0.001 * torch.randn(1200, 16, generator=generator)
    others = torch.randn(1000, 16, generator=generator)
    if new == "kinds":
        others = 0.3 * others + 10 * torch.randn(10, 16, generator=generator).repeat(100, 1)
    others = others[torch.randperm(1000, generator=generator)]
    recall = recalls(torch.cat((known, others))[None], (others[:100] - others.mean(dim=0))[None], 220)
    assert recall[1] >= max(0.95, recall[0] - 0.01), recall


@pytest.mark.parametrize("share", [0.4, 0.8, 0.98, 1.0])
def test_a_kind_that_most_keys_belong_to_does_not_shrink_the_scale(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(4000, 16, generator=generator)
    copies = int(share * len(vectors))
    vectors[:copies] = vectors[0] + 1e-3 * torch.randn(copies, 16, generator=generator)
    groups = find_duplicates(vectors, reach(vectors, 0.0008))
    if share == 1.0:
        assert groups is None  # nothing else tells how far apart is far
        assert find_duplicates(vectors[:1].repeat(500, 1), reach(vectors[:1].repeat(500, 1), 0.0008)) is not None
    else:
        assert groups is not None
        assert len(groups.first) == len(vectors) - copies + 1


@pytest.mark.parametrize("new", [repeated(20, 10, 0.001), repeated(20, 10, 0.001, seed=5), torch.zeros(0, 16)])
def test_more_rows_join_their_kind_or_begin_one(new: Tensor) -> None:
    old = repeated(20, 50, 0.001)
    groups = find_duplicates(old, 0.1)
    assert groups is not None
    every = torch.cat((old, new))
    rows = len(old) + 7 + np.arange(len(new)) * 2  # those between are set apart
    more, added = groups.extended(rows, new)
    number = {**{row: row for row in range(len(old))}, **dict(zip(rows.tolist(), range(len(old), 10**6), strict=False))}
    assert sorted(more.members.tolist()) == sorted(number)
    assert len(added) == len(more.first) - len(groups.first)
    assert 20 <= len(more.first) <= 44
    starts = np.cumsum(more.counts) - more.counts
    for first, start, count in zip(more.first, starts, more.counts, strict=True):
        kind = [number[row] for row in more.members[start : start + count].tolist()]
        assert kind[0] == number[int(first)]
        assert bool(((every[kind] - every[kind[0]]).square().sum(dim=1) <= 0.1 + 1e-4).all())


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


@pytest.mark.slow
def test_groups_grow_with_their_bank() -> None:
    keys, queries, past = filler_and_needles()
    retriever = filled(keys[:, :3500], past)
    for start in range(3500, keys.shape[1], 200):
        retriever.add(keys[:, start : start + 200])
        assert float(share_found(retriever, keys[:, : start + 200], queries).min()) > 0.9
    for last in range(10):  # nor is it built anew for a key
        retriever.add(keys[:, last : last + 1])
        retriever.flush()
    assert retriever.stats().rebuilds == 1
    assert int(retriever.indexed[0]) == keys.shape[1] + 10


@pytest.mark.slow
def test_filler_that_comes_later_is_noticed() -> None:
    qk = real_qk()["L20h1"]
    filler, queries, past = filler_and_needles()
    keys = torch.cat((qk["keys"][:, 200:1700], filler), 1)
    retriever = filled(keys[:, :1500], past)
    for start in range(1500, keys.shape[1], 600):
        retriever.add(keys[:, start : start + 600])
        retriever.flush()
    assert float(share_found(retriever, keys, queries).min()) > 0.85
    assert retriever.nbytes < 0.7 * filled(keys, past, duplicate_distance=0).nbytes


def test_a_few_kinds_are_ranked_without_looking_at_all_their_keys() -> None:
    keys, queries, past = filler_and_needles()
    few = keys[:, :6000]  # thirty kinds
    retriever = filled(few, past)
    assert float(share_found(retriever, few, queries).min()) > 0.9
    assert retriever.stats().rows_scanned < 2000 * queries.shape[1]


def test_removing_the_oldest_keys_of_a_kind_starts_no_scans() -> None:
    keys, queries, past = filler_and_needles()
    retriever = filled(keys, past, duplicate_distance=0.0008)
    retriever.remove([torch.arange(600)])
    before = retriever.stats().rows_scanned
    rows = retriever.search(queries, 8)
    assert bool((rows >= 600).all())
    assert retriever.stats().rows_scanned - before < 2000 * queries.shape[1]


class Unordered(PerBankRetriever):
    """An index whose answers are right, but in the order of their rows."""

    def new_index(self, dim: int) -> Any:
        class Index:
            keys = np.zeros((0, dim), dtype=np.float32)

            def add(self, keys: Any) -> None:
                self.keys = np.concatenate((self.keys, keys))

            def search(self, queries: Any, k: int) -> Any:
                return np.sort(np.argpartition(-(queries @ self.keys.T), k, axis=1)[:, :k], axis=1)

        return Index()


def test_an_index_may_answer_in_any_order() -> None:
    keys, queries, past = filler_and_needles()
    retriever = create_retriever(Unordered, dim=64, min_index_size=256, build="blocking")
    retriever.observe(past)
    retriever.add(keys)
    assert float(share_found(retriever, keys, queries).min()) > 0.95


@pytest.mark.slow
def test_graphs_of_banks_that_grow_in_the_background() -> None:
    keys, queries, past = filler_and_needles()
    retriever = filled(keys[:, :3000], past, build="background")
    for start in range(3000, keys.shape[1], 130):
        retriever.add(keys[:, start : start + 130].to(torch.bfloat16))
        fork = retriever.fork()
        rows = retriever.search(queries, 8)
        assert bool((rows < start + 130).all())
        assert bool((rows >= 0).all())
        assert bool((fork.search(queries, 8) < start + 130).all())
        del fork
    retriever.flush()
    assert retriever.stats().fallbacks == 0
    assert float(share_found(retriever, keys.to(torch.bfloat16).float(), queries).min()) > 0.85


@pytest.mark.parametrize("value", [-0.1, 1.5, "many", True])
def test_a_distance_that_cannot_work_is_refused(value: Any) -> None:
    with pytest.raises(SettingError, match="duplicate_distance"):
        create_retriever({"name": "hnsw", "duplicate_distance": value}, dim=8)
