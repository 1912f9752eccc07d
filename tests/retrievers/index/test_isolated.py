"""Keys that stand alone among duplicates are found by indexes of cells; other text pays nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fot.retrievers import create_retriever
from lightning_fot.retrievers.faiss_ivf import FaissIVFRetriever
from lightning_fot.retrievers.index.isolated import fit_lonely
from lightning_fot.testing import real_qk

CELLS = {
    "faiss_ivf": {"name": "faiss_ivf", "nprobe": 1, "min_index_size": 256, "build": "blocking"},
    "scann": {"name": "scann", "num_leaves_to_search": 1, "reorder": 32, "min_index_size": 256, "build": "blocking"},
}


def text_that_repeats(count: int, alone: int) -> tuple[Tensor, Tensor]:
    """Keys (1, count, 32) of 60 kinds, among them some that stand alone, and the rows (alone,) of these."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(60, 32, generator=generator)
    keys = kinds[torch.randint(60, (count,), generator=generator)]
    keys = keys + 0.01 * torch.randn(count, 32, generator=generator)
    rows = torch.randperm(count, generator=generator)[:alone].sort().values
    keys[rows] = torch.randn(alone, 32, generator=generator)
    return keys[None], rows


def missed(retriever: Any, keys: Tensor, rows: Tensor) -> int:
    """How many of the keys that stand alone are not found by the query that looks for them."""
    queries = 3 * keys[:, rows] / keys[:, rows].norm(dim=2, keepdim=True)
    nearest = (queries @ keys.transpose(1, 2)).argmax(dim=2)[0]
    own = nearest == rows
    assert own.sum() > len(rows) // 2
    found = (retriever.search(queries, 8)[0] == rows[:, None]).any(dim=1)
    return int((own & ~found).sum())


@pytest.mark.parametrize("name", list(CELLS))
def test_keys_that_stand_alone_are_found(name: str) -> None:
    keys, rows = text_that_repeats(6000, 40)
    retriever = create_retriever(CELLS[name], dim=32)
    retriever.add(keys)
    assert missed(retriever, keys, rows) == 0
    assert retriever.indexed.tolist() == [6000]
    assert retriever.stats().fallbacks == 0


def test_without_help_cells_miss_them() -> None:
    class Plain(FaissIVFRetriever):
        cells = False

    keys, rows = text_that_repeats(6000, 40)
    retriever = Plain(32, nprobe=1, min_index_size=256, build="blocking")
    retriever.add(keys)
    assert missed(retriever, keys, rows) > 5


def test_those_that_come_later_are_found_without_building_anew() -> None:
    keys, rows = text_that_repeats(6000, 40)
    retriever = create_retriever(CELLS["faiss_ivf"], dim=32)
    for start, end in ((0, 4000), (4000, 4300), (4300, 6000)):
        retriever.add(keys[:, start:end])
        retriever.flush()
        inside = rows[rows < end]
        assert missed(retriever, keys[:, :end], inside) == 0
    assert retriever.stats().rebuilds == 1
    rows_found = retriever.search(keys[:, :50], 32)[0]
    assert all(len(set(found.tolist())) == 32 for found in rows_found)


@pytest.mark.parametrize("head", ["L10h0", "L20h1"])
def test_text_that_does_not_repeat_itself_has_none(head: str) -> None:
    assert fit_lonely(real_qk()[head]["keys"][0]) is None


def test_few_are_set_apart_however_many_look_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.cat((torch.zeros(3000, 16), 10 * torch.randn(1000, 16, generator=generator)))
    fitted = fit_lonely(vectors)
    assert fitted is not None
    detector, found = fitted
    assert len(detector.find(vectors)) <= 64 + 4000 // 32
    assert torch.equal(found, detector.find(vectors))
    assert detector.nbytes == detector.pivots.numel() * 4
