"""Eight bits a coordinate, whatever the first text was like: no NaN is stored, and later texts are coded as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.retrievers import KeyStore
from tests.support.models import settings, tiny_llama, tokens


def usual(count: int, seed: int, size: float = 1.0) -> Tensor:
    """(1, count, 16): a shared mean, and coordinates of different widths."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, count, 16, generator=generator) * torch.logspace(-1, 1, 16) + 5
    return keys * size


FIRST: dict[str, Tensor] = {
    "one token": usual(1, 0).repeat(1, 200, 1),
    "almost one token": usual(1, 0).repeat(1, 200, 1) * (1 + 1e-6 * torch.randn(1, 200, 16)),
    "zeros": torch.zeros(1, 50, 16),
    "tiny": usual(50, 1, 1e-9),
    "a few": usual(3, 2),
    "one": usual(1, 3),
    "huge": usual(50, 4, 1e9),
}


def error_of(store: KeyStore, bank: int, start: int, keys: Tensor) -> float:
    """Mean error of a coordinate, over how much it varies."""
    stored = store.rows(bank, start, start + keys.shape[1])
    assert bool(torch.isfinite(stored).all())
    return float(((stored - keys[0]).abs().mean(0) / keys[0].std(0).clamp_min(1e-30)).max())


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("later", [1.0, 1e-3, 1e4, 1e12])
def test_later_texts_are_coded_as_well_as_if_they_came_first(first: str, later: float) -> None:
    store = KeyStore(16, dtype=torch.int8)
    store.append(FIRST[first])
    fork = store.fork()
    keys = usual(300, 9, later)
    if later < 1:
        # Much smaller than what came before, they are as exact as their own size allows; a hundred million times
        # smaller, they are lost.
        store.append(keys)
        stored = store.rows(0, store.lengths_list[0] - 300, store.lengths_list[0])
        off = (stored - keys[0]).abs().amax(1) - 1e-8 * float(FIRST[first].abs().max())
        assert float((off / keys[0].abs().amax(1)).max()) < 0.04
    else:
        begin = store.lengths_list[0]
        store.append(keys)
        alone = KeyStore(16, dtype=torch.int8)
        alone.append(keys)
        if later * 1e3 > float(FIRST[first].abs().max()):
            # Of the narrowest coordinate, beside vectors that lie hundreds of its spreads away.
            assert error_of(store, 0, begin, keys) < max(0.1, 4 * error_of(alone, 0, 0, keys))
    # A fork of before has what it had.
    assert torch.equal(fork.rows(0, 0, FIRST[first].shape[1]), fork.fork().rows(0, 0, FIRST[first].shape[1]))
    assert bool(torch.isfinite(store.view()).all())


@pytest.mark.parametrize("first", ["one token", "almost one token", "zeros", "tiny", "an outlier"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_few_vectors_that_are_unlike_all_before_are_coded_as_well(first: str, count: int) -> None:
    outlier = torch.randn(1, 22, 16, generator=torch.Generator().manual_seed(1))
    outlier[0, 0, 3] = 3e4
    store = KeyStore(16, dtype=torch.int8)
    store.append(outlier if first == "an outlier" else FIRST[first])
    few = torch.randn(1, count, 16, generator=torch.Generator().manual_seed(2)) * 1e5
    store.append(few)
    stored = store.rows(0, store.lengths_list[0] - count, store.lengths_list[0])
    assert float((stored - few[0]).abs().max()) < 0.05 * float(few.abs().max())


def test_vectors_that_vary_around_nothing_leave_much_smaller_ones_their_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    store = KeyStore(16, dtype=torch.int8)
    store.append(1e4 * torch.randn(1, 20, 16, generator=generator))
    small = torch.randn(1, 40, 16, generator=generator)
    store.append(small)
    assert float((store.rows(0, 20, 60) - small[0]).abs().max()) < 0.05 * float(small.abs().max())


@given(
    exponents=st.lists(st.floats(-4, 4), min_size=1, max_size=6),
    counts=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    mean=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**20),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_vector_is_far_off_whatever_lies_beside_it(
    exponents: list[float], counts: list[int], mean: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    store, texts = KeyStore(16, 2, torch.int8), []
    for exponent, count in zip(exponents, counts, strict=False):
        text = (torch.randn(2, count, 16, generator=generator) * torch.logspace(-1, 1, 16) + mean) * 10**exponent
        store.append(text)
        texts.append(text)
    whole, queries = torch.cat(texts, 1), torch.randn(3, 16, generator=generator)
    stored = store.view()
    # A vector may be coded twice; each time it may be off by 3 %.
    off = (stored - whole).abs().amax(2) - 1e-8 * float(whole.abs().max())
    assert float((off / whole.abs().amax(2)).max()) < 0.07
    for bank in range(2):
        blocks = [block for block, _ in store.scan_coded(bank)]
        for block in blocks:
            rows = slice(block.start, block.start + len(block.keys))
            want = queries @ stored[bank, rows].T
            have = block.scores(queries, 0, len(block.keys), torch.empty_like(want))
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_texts_that_take_turns_do_not_code_all_anew_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    store, anew, work = KeyStore(16, dtype=torch.int8), [0], KeyStore._code_anew

    def counted(*args: Any) -> None:
        anew[0] += 1
        work(*args)

    monkeypatch.setattr(KeyStore, "_code_anew", counted)
    for turn in range(30):
        store.append(FIRST["one token"] if turn % 2 else usual(40, turn, 10.0 ** (turn % 3)))
        for single in range(3):
            store.append(usual(1, single, 50.0))
    assert anew[0] <= 4


def test_what_cannot_be_held_is_refused_with_the_dtype() -> None:
    store = KeyStore(16, dtype=torch.int8)
    store.append(usual(50, 1))
    before = store.view().clone()
    with pytest.raises(SettingError, match="int8"):
        store.append(torch.full((1, 2, 16), 3e38) * torch.tensor([1.0, -1.0])[None, :, None])
    assert torch.equal(store.view(), before)


@pytest.mark.slow
@pytest.mark.parametrize("window_start", [0, 1])
def test_a_memory_that_begins_with_one_token_goes_on(window_start: int, tmp_path: Any) -> None:
    model = tiny_llama()
    text = tokens(1, 150)
    found = []
    for dtype in ("float32", "int8"):
        with attach_memory(model, settings(dtype=dtype, skip_window_start=window_start)) as lm, torch.no_grad():
            memory = lm.ingest(torch.full((1, 100), 7), lm.new_memory())
            memory.save(tmp_path / dtype)
            lm.ingest(text, memory)
            # Saved again, all is written anew where it was coded anew.
            memory.save(tmp_path / dtype)
            again = lm.load_memory(tmp_path / dtype)
            for layer in (1, 3):
                assert torch.equal(again.layers[layer].keys, memory.layers[layer].keys)
            found.append(lm(text[:, :12], memory=memory).logits)
    assert float((found[0] - found[1]).abs().max()) < 0.1 * float(found[0].std())
