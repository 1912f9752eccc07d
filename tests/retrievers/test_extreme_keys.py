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
