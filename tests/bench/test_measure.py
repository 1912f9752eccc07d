"""Measures of recall and speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_fot.bench import DEFAULT_QUERY_GRIDS, load_qk, measure_retriever
from lightning_fot.errors import SettingError
from lightning_fot.retrievers import ExactRetriever
from lightning_fot.testing import real_qk


def test_exact_search_scores_one_even_with_ties() -> None:
    keys = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 4, 1)
    (row,) = measure_retriever("exact", keys, keys[:, :9], k=6, repeats=2, batch=4)
    assert (row["recall"], row["memory_tokens"], row["k"], row["index_used"]) == (1.0, 200, 6, True)
    assert row["mass_recall"] == pytest.approx(1.0, abs=1e-9)
    assert 0 < row["mass"] < 1
    assert row["search_ms_p99"] >= row["search_ms_p95"] >= row["search_ms_p50"] > 0
    assert row["qps"] > 0
    assert row["bytes"] >= 2 * 200 * 8 * 4
    json.dumps(row)


def test_each_batch_size_is_a_row_of_the_same_index() -> None:
    keys = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0))
    grid = [{"ef_search": 8}, {"ef_search": 64}]
    rows = measure_retriever(
        "hnsw", keys, keys[:, :9], k=6, query_grid=grid, repeats=2, batch=[1, 32], min_index_size=1
    )
    assert [(row["args"]["ef_search"], row["batch"]) for row in rows] == [(8, 1), (8, 32), (64, 1), (64, 32)]
    assert len({(row["build_s"], row["bytes"]) for row in rows}) == 1
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["recall"] == second["recall"]
    for batch in (0, [1, 0]):
        with pytest.raises(SettingError, match="batch=0"):
            measure_retriever("exact", keys, keys, batch=batch)


class Worst(ExactRetriever):
    """Finds the k worst keys."""

    def _search(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        return super()._search(-queries, k)


def test_definitions_by_hand() -> None:
    keys = torch.tensor([[[3.0], [2.0], [1.0], [0.0]]])
    queries = torch.ones(1, 1, 1)
    (row,) = measure_retriever(Worst, keys, queries, k=2, scale=1.0, repeats=1)
    weights = np.exp([3.0, 2.0, 1.0, 0.0])
    assert row["recall"] == 0
    assert row["mass_recall"] == pytest.approx(weights[2:].sum() / weights[:2].sum())
    assert row["mass"] == pytest.approx(weights[2:].sum() / weights.sum())
    assert row["retriever"] == "Worst"


def test_one_build_gives_a_whole_curve() -> None:
    qk = real_qk()["L10h0"]
    rows = measure_retriever(
        {"name": "faiss_ivf", "nlist": 64},
        qk["keys"],
        qk["queries"],
        qk["past_queries"],
        repeats=1,
        min_index_size=1024,
    )
    assert [row["args"]["nprobe"] for row in rows] == [grid["nprobe"] for grid in DEFAULT_QUERY_GRIDS["faiss_ivf"]]
    assert rows[0]["args"]["nlist"] == 64
    recalls = [row["recall"] for row in rows]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.999
    assert all(row["index_used"] for row in rows)
    (small,) = measure_retriever("hnsw", qk["keys"], qk["queries"], query_grid=[{}], repeats=1)
    assert not small["index_used"]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_load_qk(tmp_path: Path, kind: str) -> None:
    arrays = {"a_keys": np.ones((5, 4), np.float16), "a_queries": np.ones((1, 3, 4), np.float16), "b_keys": np.ones(3)}
    file = tmp_path / f"qk.{kind}"
    if kind == "npz":
        np.savez(file, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    loaded = load_qk(file)
    assert list(loaded) == ["a"]
    assert {name: tuple(value.shape) for name, value in loaded["a"].items()} == {
        "keys": (1, 5, 4),
        "queries": (1, 3, 4),
    }


def test_load_qk_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no")
    np.savez(tmp_path / "x.npz", keys=np.ones(3))
    for name, message in (("none.npz", "not a file"), ("x.txt", "unknown kind"), ("x.npz", "holds no")):
        with pytest.raises(SettingError, match=message):
            load_qk(tmp_path / name)
