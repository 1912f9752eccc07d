from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.evaluation.measures.perplexity import (
    block_sums,
    difference,
    estimate,
    losses_with_memory,
    losses_without_memory,
    token_losses,
)
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone

WINDOW = 16


@pytest.fixture(scope="module")
def lm() -> MemoryLM:
    return attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1, 3], window=WINDOW, top_k=8))


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (tokens,), generator=torch.Generator().manual_seed(seed))


def test_equal_blocks_give_the_standard_error_of_their_means() -> None:
    losses = torch.rand(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimate(block_sums(losses, 256))
    means = losses.reshape(4, 256).mean(1)
    assert found.mean == pytest.approx(float(losses.mean()))
    assert found.standard_error == pytest.approx(float(means.std() / 2))
    assert (found.tokens, found.blocks) == (1024, 4)


def test_one_block_has_no_standard_error() -> None:
    assert estimate(block_sums(torch.ones(100))).standard_error is None


def test_the_standard_error_is_the_spread_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    # Losses of a block share a common part, as text does: the naive error over tokens would be far too small.
    means, errors = [], []
    for _ in range(300):
        losses = torch.randn(16, 1, generator=generator) + 0.1 * torch.randn(16, 64, generator=generator)
        found = estimate(block_sums(losses.flatten(), 64))
        assert found.standard_error is not None
        means.append(found.mean)
        errors.append(found.standard_error)
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(means).std()), rel=0.15)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 256)), min_size=1, max_size=20), st.floats(-5, 5))
def test_a_constant_difference_is_found_without_error(blocks: list[tuple[float, int]], shift: float) -> None:
    ours = [(total - shift * count, count) for total, count in blocks]
    found = difference(ours, blocks)
    assert found.mean == pytest.approx(shift, abs=1e-6)
    assert found.standard_error is None or found.standard_error < 1e-6


def test_token_losses_are_cross_entropies_of_any_length() -> None:
    logits, targets = torch.randn(700, 50), torch.randint(0, 50, (700,))
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_losses(logits, targets), expected)


def test_without_memory_each_window_stands_alone(lm: MemoryLM) -> None:
    target = text(3 * WINDOW + 6)
    done: list[int] = []
    losses = losses_without_memory(lm, target, done.append)
    assert len(losses) == sum(done) == 3 * WINDOW + 5
    alone = lm(target[None, WINDOW : 2 * WINDOW]).logits[0]
    expected = F.cross_entropy(alone, target[WINDOW + 1 : 2 * WINDOW + 1], reduction="none")
    torch.testing.assert_close(losses[WINDOW : 2 * WINDOW], expected)


def test_with_memory_is_one_long_reading(lm: MemoryLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(7 * WINDOW + 1, seed=2)
    whole = lm(ids[None, :-1]).logits[0]
    expected = F.cross_entropy(whole, ids[1:], reduction="none")[3 * WINDOW :]
    memory = lm.ingest(ids[None, : 3 * WINDOW], memory=lm.new_memory(1))
    losses = losses_with_memory(lm, ids[3 * WINDOW :], memory)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert len(memory) == 3 * WINDOW
    monkeypatch.setattr("lightning_fot.evaluation.measures.perplexity.TOKENS_A_CALL", WINDOW)
    in_pieces = losses_with_memory(lm, ids[3 * WINDOW :], memory)
    torch.testing.assert_close(in_pieces, losses, rtol=1e-4, atol=1e-5)


def test_an_empty_memory_is_no_memory_for_one_window(lm: MemoryLM) -> None:
    target = text(WINDOW + 1, seed=3)
    empty = losses_with_memory(lm, target, lm.new_memory(1))
    torch.testing.assert_close(empty, losses_without_memory(lm, target))
    assert math.isfinite(float(empty.sum()))
