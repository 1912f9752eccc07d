"""Key buffers: growth, snapshots and isolation."""

from __future__ import annotations

import pytest
import torch

from lightning_fot.errors import SettingError
from lightning_fot.retrievers import KeyStore, create_retriever


def test_view_is_the_buffer_and_grows_by_doubling() -> None:
    store = KeyStore(2, 1)
    store.append(torch.ones(1, 3, 2))
    assert store.view().data_ptr() == store.bank(0).data_ptr()
    first = store.capacity
    store.append(torch.ones(1, first, 2))
    assert store.capacity == 2 * first
    assert store.nbytes == 2 * first * 2 * 4


def test_one_side_of_a_fork_appends_in_place_and_the_other_copies() -> None:
    store = KeyStore(1, 1)
    store.append(torch.zeros(1, 4, 1))
    twin = store.fork()
    assert twin.view().data_ptr() == store.view().data_ptr()
    store.append(torch.full((1, 2, 1), 5.0))
    assert twin.view().data_ptr() == store.view().data_ptr()
    twin.append(torch.full((1, 2, 1), 7.0))
    assert twin.view().data_ptr() != store.view().data_ptr()
    assert store.bank(0).flatten().tolist() == [0, 0, 0, 0, 5, 5]
    assert twin.bank(0).flatten().tolist() == [0, 0, 0, 0, 7, 7]


def test_a_dead_fork_costs_no_copy() -> None:
    store = KeyStore(1, 1)
    store.append(torch.zeros(1, 4, 1))
    store.fork().append(torch.ones(1, 1, 1))
    place = store.view().data_ptr()
    store.append(torch.full((1, 1, 1), 2.0))
    assert store.view().data_ptr() == place
    assert store.bank(0).flatten().tolist() == [0, 0, 0, 0, 2]


def test_reset_does_not_disturb_a_fork() -> None:
    store = KeyStore(1, 2)
    store.append(torch.arange(6.0).view(2, 3, 1))
    twin = store.fork()
    store.reset([1])
    store.append(torch.full((2, 2, 1), 9.0))
    assert twin.bank(1).flatten().tolist() == [3, 4, 5]
    assert store.bank(1).flatten().tolist() == [9, 9]
    assert store.lengths.tolist() == [5, 2]


def test_a_retriever_on_a_store_copies_nothing() -> None:
    store = KeyStore(4, 2, torch.bfloat16)
    retriever = create_retriever("exact", dim=4, banks=2)
    retriever.use_store(store)
    keys = torch.randn(2, 10, 4)
    store.append(keys)
    retriever.add(keys)
    assert retriever.nbytes == 0
    assert retriever.store is store
    assert retriever.search(torch.randn(2, 1, 4), 3).shape == (2, 1, 3)


def test_use_store_refuses_late_calls_and_other_shapes() -> None:
    retriever = create_retriever("exact", dim=4)
    with pytest.raises(SettingError, match="store"):
        retriever.use_store(KeyStore(5, 1))
    retriever.add(torch.ones(1, 1, 4))
    with pytest.raises(SettingError, match="use_store first"):
        retriever.use_store(KeyStore(4, 1))
