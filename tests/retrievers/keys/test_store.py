"""Key buffers: growth, snapshots and isolation."""

from __future__ import annotations

import pickle
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.retrievers import KeyStore, create_retriever


def test_view_is_the_buffer() -> None:
    store = KeyStore(2, 1)
    store.append(torch.ones(1, 3, 2))
    assert store.view().data_ptr() == store.bank(0).data_ptr()


def test_a_shared_past_is_never_copied() -> None:
    store = KeyStore(4, 1)
    store.append(torch.randn(1, 5000, 4))
    twins = [store.fork() for _ in range(5)]
    for number, twin in enumerate(twins):
        for step in range(10):
            twin.append(torch.full((1, 300, 4), float(100 * number + step)))
    store.append(torch.full((1, 10, 4), -1.0))
    # 5 twins of 3,000 keys of their own, and the 5,000 once: copies of the past would be 25,000 more.
    segments = {id(part.segment): part.segment for one in [store, *twins] for part in one._parts}
    assert sum(segment.nbytes for segment in segments.values()) < 2 * (5000 + 5 * 3000) * 4 * 4 + 6 * 256 * 16
    for number, twin in enumerate(twins):
        assert torch.equal(twin.bank(0)[:5000], store.bank(0)[:5000])
        assert twin.bank(0)[5000::300, 0].tolist() == [100 * number + step for step in range(10)]
    assert store.bank(0)[5000:, 0].tolist() == [-1.0] * 10


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


class Model:
    """What a store should hold: vectors (n, 3) for each bank."""

    def __init__(self, banks: list[Tensor]) -> None:
        self.banks = banks


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "file"])
def test_any_history_of_forks_equals_lists(kind: str, data: st.DataObject) -> None:
    """Appends, forks, choices of banks, truncation, packing and resets, in any order, on all descendants at once."""
    dtype = getattr(torch, "float32" if kind == "file" else kind)
    with TemporaryDirectory() as folder:
        store = KeyStore(3, 2, dtype, folder=folder if kind == "file" else None)
        family = [(store, Model([torch.zeros(0, 3), torch.zeros(0, 3)]))]
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        for _ in range(data.draw(st.integers(1, 25))):
            number = data.draw(st.integers(0, len(family) - 1))
            store, model = family[number]
            action = data.draw(
                st.sampled_from(["append", "append", "append", "fork", "select", "keep", "truncate", "reset", "drop"])
            )
            if action == "append":
                counts = [data.draw(st.sampled_from([0, 1, 5, 300, 1100])) for _ in model.banks]
                keys = torch.randn(len(counts), max(counts), 3, generator=generator).to(torch.bfloat16).float()
                before, quantiser = store.lengths_list, store.quantiser
                store.append(keys, torch.tensor(counts))
                for bank, count in enumerate(counts):
                    # Eight bits: what was stored is what counts from now on.
                    stored = store.rows(bank, before[bank], before[bank] + count).float()
                    torch.testing.assert_close(stored, keys[bank, :count], atol=0.2 if kind == "int8" else 0, rtol=0)
                    earlier = store.rows(bank, 0, before[bank]).float()
                    # Where new vectors need other spreads, those before are coded anew; else not a bit of them changes.
                    if kind != "int8" or store.quantiser is quantiser:
                        assert torch.equal(earlier, model.banks[bank])
                    torch.testing.assert_close(earlier, model.banks[bank], atol=0.1 if kind == "int8" else 0, rtol=0)
                    model.banks[bank] = torch.cat([earlier, stored])
            elif action in ("fork", "select") and len(family) < 5:
                banks = list(range(len(model.banks)))
                if action == "select":
                    banks = data.draw(st.lists(st.sampled_from(banks), min_size=1, max_size=3))
                family.append((store.select(banks), Model([model.banks[bank] for bank in banks])))
            elif action == "keep":
                masks = [torch.rand(len(rows), generator=generator) < 0.7 for rows in model.banks]
                store.keep(masks)
                model.banks = [rows[mask] for rows, mask in zip(model.banks, masks, strict=True)]
            elif action == "truncate":
                lengths = [data.draw(st.integers(0, len(rows))) for rows in model.banks]
                store.truncate(lengths)
                model.banks = [rows[:length] for rows, length in zip(model.banks, lengths, strict=True)]
            elif action == "reset":
                bank = data.draw(st.integers(0, len(model.banks) - 1))
                store.reset([bank])
                model.banks[bank] = torch.zeros(0, 3)
            elif action == "drop" and len(family) > 1:
                del family[number]
            for one, expected in family:
                check(one, expected, generator)


def check(store: KeyStore, model: Model, generator: torch.Generator) -> None:
    assert store.lengths_list == [len(rows) for rows in model.banks]
    for bank, rows in enumerate(model.banks):
        assert torch.equal(store.bank(bank).float(), rows)
        assert torch.equal(
            torch.cat([torch.zeros(0, 3), *(block.float() for _, block in store.blocks(bank, size=97))]), rows
        )
        if len(rows):
            numbers = torch.randint(0, len(rows), (2, 9), generator=generator)
            assert torch.equal(store.take(bank, numbers).float(), rows[numbers])
            assert torch.equal(store.view()[bank, : len(rows)].float(), rows)


def test_pickled_stores_hold_the_same_bits() -> None:
    for dtype in (torch.float32, torch.int8):
        store = KeyStore(3, 2, dtype)
        store.append(torch.randn(2, 1500, 3), torch.tensor([1500, 30]))
        twin = store.fork()
        store.append(torch.randn(2, 50, 3))
        twin.append(torch.randn(2, 2000, 3))
        for one in (store, twin):
            again = pickle.loads(pickle.dumps(one))
            again.append(torch.ones(2, 1, 3))
            assert again.lengths_list == [length + 1 for length in one.lengths_list]
            assert all(torch.equal(again.bank(bank)[:-1], one.bank(bank)) for bank in range(2))
