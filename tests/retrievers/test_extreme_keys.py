"""Keys of any size that a number of single precision can have: rows are right, and no library ends the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_fot.retrievers import create_retriever

SPECS: dict[str, dict[str, Any]] = {
    "exact": {"name": "exact"},
    "hnsw": {"name": "hnsw", "ef_search": 1000},
    "faiss_ivf": {"name": "faiss_ivf", "nlist": 2, "nprobe": 2},
    "half": {"name": "faiss_ivf", "nlist": 2, "nprobe": 2, "index_dtype": "float16"},
    "scann": {"name": "scann", "num_leaves_to_search": 1000, "reorder": 1000},
}


def recall(spec: dict[str, Any], keys: torch.Tensor, queries: torch.Tensor, k: int = 10) -> float:
    if spec["name"] != "exact":
        spec = {**spec, "min_index_size": 64, "build": "blocking", "num_threads": 1}
    retriever = create_retriever(spec, dim=16)
    retriever.add(keys[:, :300])
    retriever.flush()
    retriever.add(keys[:, 300:])
    rows = retriever.search(queries, k)[0]
    assert retriever.stats().fallbacks == 0
    assert bool((rows >= 0).all())
    assert all(len(set(line)) == k for line in rows.tolist())
    true = queries[0].double() @ keys[0].double().T
    least = true.topk(k, dim=1).values[:, -1:]
    return float((true.gather(1, rows) >= least - 1e-5 * true.abs().amax(1, keepdim=True)).double().mean())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("transform", ["auto", "none"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 7e4, 1e19, 1e30])
def test_all_keys_are_of_an_unusual_size(name: str, transform: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 400, 16, generator=generator), torch.randn(1, 12, 16, generator=generator)
    spec = {**SPECS[name], "transform": transform}
    assert recall(spec, keys * size, queries) > 0.95
    if size > 1:
        assert recall(spec, keys, queries * size) > 0.95


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("transform", ["auto", "none"])
@pytest.mark.parametrize("size", [1e6, 1e19, 1e37])
@pytest.mark.parametrize("later", [False, True])
def test_a_few_keys_are(name: str, transform: str, size: float, later: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(1, 400, 16, generator=generator), torch.randn(1, 12, 16, generator=generator)
    keys[:, 300:303] *= size
    if not later:
        keys = keys.flip(1)
    assert recall({**SPECS[name], "transform": transform}, keys, queries) > 0.95


@pytest.mark.parametrize("share", [0.004, 0.02])
@pytest.mark.parametrize("factor", [5, 20])
def test_a_graph_that_has_seen_no_queries_finds_what_lies_behind_a_few_long_keys(share: float, factor: float) -> None:
    """They are among the best of half of all queries; a sphere as wide as they are long left .84 to .91 of the rest."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2500, 32, generator=generator) + 2 * torch.randn(32, generator=generator)
    keys[:, torch.randperm(2500, generator=generator)[: int(share * 2500)]] *= factor
    queries = torch.randn(1, 60, 32, generator=generator)
    retriever = create_retriever(
        {"name": "hnsw", "min_index_size": 1000, "build": "blocking", "num_threads": 1}, dim=32
    )
    retriever.add(keys)
    retriever.flush()
    assert retriever.indexed.tolist() == [2500]
    rows = retriever.search(queries, 32)[0]
    best = (queries[0] @ keys[0].T).topk(32).indices
    found = sum(len(set(ours) & set(true)) for ours, true in zip(rows.tolist(), best.tolist(), strict=True))
    assert found / best.numel() > 0.945
