"""A model beside a memory in shards computes what it computes beside one in its own process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.memory import Memory
from tests.support.models import settings, tiny_llama, tokens
from tests.support.shards import SHARDS

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def beside(changes: dict[str, Any], work: Any, kv_heads: int = 2) -> tuple[Any, Any]:
    """What ``work(lm)`` gives beside memories in shards, and beside those of this process."""
    model, found = tiny_llama(kv_heads), []
    for shards in (SHARDS, None):
        with attach_memory(model, settings(**{"top_k": 6, **changes}, shards=shards)) as lm, torch.no_grad():
            found.append(work(lm))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [
        ({}, 1),
        ({"capacity": 48}, 2),
        ({"dense_pairs": 4096}, 2),
        ({"attending": "gate"}, 2),
        ({"overlap": 4, "sink_tokens": 2, "positions": "constant"}, 4),
    ],
)
def test_logits_and_texts_are_the_same(cluster: Any, changes: dict[str, Any], kv_heads: int) -> None:
    def work(lm: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        memory = lm.ingest(tokens(2, 120, 1), lm.new_memory(2), attention_mask=_ragged(120))
        out = lm(tokens(2, 40, 2), memory=memory, labels=tokens(2, 40, 2))
        text = lm.generate(tokens(2, 20, 3), memory=memory, max_new_tokens=12, update_memory=True)
        return out.logits, out.loss, text, memory.lengths

    own, other = beside(changes, work, kv_heads)
    torch.testing.assert_close(own[0], other[0], **CLOSE)
    torch.testing.assert_close(own[1], other[1], **CLOSE)
    assert torch.equal(own[2], other[2])
    assert torch.equal(own[3], other[3])


def _ragged(width: int) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor([width, width - 37])[:, None]).long()


def test_beams_have_memories_of_their_own(cluster: Any) -> None:
    def work(lm: Any) -> torch.Tensor:
        memory = lm.ingest(tokens(1, 64, 1), lm.new_memory(1))
        text: torch.Tensor = lm.generate(tokens(1, 20, 3), memory=memory, max_new_tokens=30, num_beams=3)
        return text

    own, other = beside({}, work)
    assert torch.equal(own, other)


@pytest.mark.parametrize("dense_pairs", [0, 4096])
def test_passages_are_the_same(cluster: Any, dense_pairs: int) -> None:
    def work(lm: Any) -> tuple[Memory, Any]:
        memory = lm.new_memory(1)
        for number in range(4):
            lm.ingest(tokens(1, 40, number), memory, document=f"text {number}")
        with lm.record_attention() as trace:
            lm.generate(tokens(1, 10, 2), memory=memory, max_new_tokens=10)
        return trace.pair_mass(memory), trace.passages(memory, length=8)

    own, other = beside({"dense_pairs": dense_pairs}, work)
    for got, want in zip(own[0], other[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-2)
    assert [(one.document, one.start, one.stop) for one in own[1]] == [
        (one.document, one.start, one.stop) for one in other[1]
    ]


def test_gradients_flow_through_what_was_found(cluster: Any) -> None:
    model, found = tiny_llama(), []
    for shards in (SHARDS, None):
        with attach_memory(model, settings(top_k=6, shards=shards)) as lm:
            memory = lm.ingest(tokens(1, 80, 1), lm.new_memory(1))
            model.zero_grad()
            out = lm(tokens(1, 16, 2), memory=memory, labels=tokens(1, 16, 2))
            out.loss.backward()
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) > 10
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-2)


def test_texts_side_by_side_share_one_memory(cluster: Any) -> None:
    def work(lm: Any) -> list[torch.Tensor]:
        memory = lm.ingest(tokens(1, 100, 1), lm.new_memory(1))
        copies = [memory.snapshot() for _ in range(3)]
        for number, copy in enumerate(copies):
            lm.ingest(tokens(1, 20, number), copy)
        return [lm(tokens(1, 16, 5), memory=copy).logits for copy in (memory, *copies)]

    own, other = beside({}, work)
    for got, want in zip(own, other, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_what_is_of_the_machine_is_refused_together(cluster: Any) -> None:
    with pytest.raises(SettingError, match="Set shards or offload_dir"):
        settings(shards=2, offload_dir=".")
