"""Attention to stored pairs, and the passages it points at, against an explicit softmax and brute force."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.memory import Memory
from lightning_fot.memory.found import Retrieved
from lightning_fot.memory.passages import AttentionTrace
from lightning_fot.memory.windows import best_windows
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.lm import MemoryLM
from tests.support.models import settings, tiny_llama, tokens


def reader(**changes: Any) -> MemoryLM:
    return attach_memory(tiny_llama(), settings(**changes))


def read(lm: MemoryLM, **documents: Tensor) -> Memory:
    memory = lm.new_memory(1)
    for name, ids in documents.items():
        lm.ingest(ids, memory, document=name)
    return memory


@pytest.mark.parametrize("max_scores", [2**26, 60])
def test_weights_are_those_of_the_one_softmax(max_scores: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2, 2))
    far_key, far_value = (torch.randn(2, 2, 10, 3, 8, generator=draw) for _ in range(2))
    valid = torch.rand(2, 2, 10, 3, generator=draw) < 0.7
    seen: list[Tensor] = []
    outside = Retrieved(far_key, far_value, valid)
    attend(query, key, value, outside, scale=0.3, max_scores=max_scores, on_weights=seen.append)
    assert len(seen) == 1
    assert seen[0].shape == (2, 2, 10, 3)
    for row, head, place in itertools.product(range(2), range(4), range(5)):
        group, fold = head // 2, head % 2 * 5 + place
        local = [float(query[row, head, place] @ key[row, group, j]) * 0.3 for j in range(place + 1)]
        far = [float(query[row, head, place] @ far_key[row, group, fold, j]) * 0.3 for j in range(3)]
        total = sum(math.exp(s) for s in local)
        total += sum(math.exp(s) for s, there in zip(far, valid[row, group, fold].tolist(), strict=True) if there)
        for j in range(3):
            expected = math.exp(far[j]) / total if valid[row, group, fold, j] else 0.0
            assert float(seen[0][row, group, fold, j]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_k", [4096, 5])
def test_recording_changes_no_token_and_both_kinds_of_reading_see_the_same_mass(top_k: int) -> None:
    lm = reader(top_k=top_k, skip_window_start=1)
    memory = read(lm, a=tokens(1, 40), b=tokens(1, 30, 1))
    prompt = tokens(1, 12, 2)
    plain = lm.generate(prompt, memory, max_new_tokens=4, do_sample=False)
    with lm.record_attention() as trace, lm.record_queries() as queries:
        recorded = lm.generate(prompt, memory, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, recorded)
    assert queries
    # The 12 tokens of the prompt and 3 of the 4 that follow, read in one window by an ordinary call.
    with lm.record_attention() as window:
        lm(recorded[:, :-1], memory=memory)
    for one, other in zip(trace.pair_mass(memory), window.pair_mass(memory), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    prompt_mass = trace.pair_mass(memory, queries="prompt")[0]
    answer_mass = trace.pair_mass(memory, queries="answer")[0]
    assert torch.allclose(prompt_mass + answer_mass, trace.pair_mass(memory)[0], atol=1e-5)
    with lm.record_attention() as window:
        lm(prompt[:, :-1], memory=memory)
    assert torch.allclose(prompt_mass, window.pair_mass(memory)[0], atol=1e-4)


def test_padding_asks_nothing_and_rows_are_apart() -> None:
    lm = reader(top_k=5)
    both = lm.new_memory(2)
    lm.ingest(tokens(2, 30), both)
    prompts, mask = tokens(2, 10, 1), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :4] = 0
    with lm.record_attention() as trace:
        lm.generate(prompts, both, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for row, start in ((0, 4), (1, 0)):
        alone = both.select_rows(torch.tensor([row]))
        with lm.record_attention() as single:
            lm.generate(prompts[row : row + 1, start:], alone, max_new_tokens=3, do_sample=False)
        for one, other in zip(trace.pair_mass(both, row), single.pair_mass(alone), strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_pairs_that_every_query_finds_count_less() -> None:
    """Sums, and the correction, against the formula on made-up weights."""
    lm = reader(memory_layers=[1])
    memory = read(lm, a=tokens(1, 30))
    draw = torch.Generator().manual_seed(3)
    trace = AttentionTrace()
    weights = torch.rand(1, 2, 6, 4, generator=draw) * 0.2
    rows = torch.stack([torch.randperm(30, generator=draw)[:4] for _ in range(12)]).reshape(1, 2, 6, 4)
    rows[..., 0] = 29  # a hub
    rows[0, 0, 0, 3], weights[0, 0, 0, 3] = -1, 0  # fewer pairs than asked for
    for part in (slice(0, 2), slice(2, 6)):
        trace.add(
            1, weights[:, :, part], rows=rows[:, :, part], valid=None, forgotten=torch.zeros(1, dtype=torch.int64)
        )
    mass, corrected = torch.zeros(30), torch.zeros(30)
    for head, pair in itertools.product(range(2), range(30)):
        hits = [
            (float(weights[0, head, q, k]), float(weights[0, head, q, k] / weights[0, head, q].sum()))
            for q, k in itertools.product(range(6), range(4))
            if rows[0, head, q, k] == pair
        ]
        if hits:
            mass[pair] += sum(weight for weight, _ in hits)
            corrected[pair] += math.log(7 / len(hits)) ** 2 * sum(share**2 for _, share in hits)
    found = trace.pair_mass(memory)
    assert torch.allclose(found[0], mass, atol=1e-6)
    assert torch.allclose(found[1], corrected, atol=1e-5)
    assert int(mass.argmax()) == 29
    assert int(corrected.argmax()) != 29


def test_what_another_prompt_attends_to_as_well_does_not_count() -> None:
    """Excess, against the formula on made-up weights of two layers, one of which the other prompt did not ask."""
    lm = reader()
    memory = read(lm, a=tokens(1, 30))
    draw = torch.Generator().manual_seed(4)

    def noted(queries: int, layers: list[int]) -> tuple[AttentionTrace, Tensor]:
        trace, mean = AttentionTrace(), torch.zeros(4, 2, 30)
        for layer in layers:
            weights = torch.rand(1, 2, queries, 30, generator=draw) ** 4
            weights[..., 7] = 1  # a hub
            trace.add(layer, weights, rows=None, valid=None, forgotten=torch.zeros(1, dtype=torch.int64))
            mean[layer] = weights[0].mean(1)
        return trace, mean

    asked, mine = noted(6, [1, 3])
    other, neutral = noted(10, [3])
    mass, excess = asked.pair_excess(memory, other)
    expected = (mine[3] - 2 * neutral[3]).clamp_min(0).sum(0) + mine[1].sum(0)
    assert torch.allclose(mass, 6 * mine.sum((0, 1)), atol=1e-5)
    assert torch.allclose(excess, expected, atol=1e-6)
    asked, mine = noted(6, [3])
    assert int(asked.pair_mass(memory)[0].argmax()) == 7
    best = asked.passages(memory, length=1, top=1, against=other)[0]
    excess = (mine[3] - 2 * neutral[3]).clamp_min(0).sum(0)
    assert best.start == int(excess.argmax()) != 7
    assert best.lift == pytest.approx(float(excess.max() / excess.sum()))


def test_best_windows_equal_brute_force() -> None:
    for seed in range(40):
        draw = random.Random(seed)
        length, bounds, at = draw.randint(1, 6), [], 0
        for _ in range(draw.randint(1, 3)):
            size = draw.randint(1, 15)
            bounds.append((at, at + size))
            at += size + length
        free = [place for low, high in bounds for place in range(low, high)]
        places = sorted(draw.sample(free, draw.randint(1, len(free))))
        scores = [draw.choice([0.0, 1.0, 2.0, 5.0]) for _ in places]
        left = dict(zip(places, scores, strict=True))
        found = best_windows(torch.tensor(places), torch.tensor(scores), length, 3, bounds)
        taken: list[tuple[int, int]] = []
        for start, stop in found:
            assert start < stop <= start + length
            assert any(low <= start and stop <= high for low, high in bounds)
            assert all(stop <= low or high <= start for low, high in taken)
            options = []
            for low, high in bounds:
                for begin in range(low, high):
                    cells = range(begin, min(high, begin + length))
                    if not any(a <= cell < b for cell in cells for a, b in taken):
                        options.append(sum(left.get(cell, 0.0) for cell in cells))
            assert sum(left.get(place, 0.0) for place in range(start, stop)) >= max(options, default=0.0)
            taken.append((start, stop))
            left = {place: 0.0 if start <= place < stop else score for place, score in left.items()}
        if len(found) < 3:
            assert not any(left.values())


def test_passages_name_documents_and_their_tokens() -> None:
    lm = reader(top_k=4, skip_window_start=2)
    texts = {"a": tokens(1, 50), "b": tokens(1, 9, 1), "c": tokens(1, 70, 2)}
    memory = read(lm, **texts)
    # A prompt longer than the window moves its own pairs into the copy that is attended to: no passages of documents.
    with lm.record_attention() as trace:
        lm.generate(tokens(1, 40, 5), memory, max_new_tokens=8, do_sample=False)
    passages = trace.passages(memory, length=8, top=6)
    assert len(passages) == 6
    spans: dict[str, list[range]] = {}
    for passage in passages:
        name = passage.document.name
        assert name is not None
        assert 0 <= passage.start < passage.stop <= passage.document.tokens == texts[name].shape[1]
        assert torch.equal(passage.token_ids, texts[name][0, passage.start : passage.stop])
        span = range(passage.start, passage.stop)
        assert len(span) <= 8
        assert not any(set(span) & set(other) for other in spans.get(name, []))
        spans.setdefault(name, []).append(span)
        # Its mass is what its pairs have.
        mass, corrected = trace.pair_mass(memory)
        numbers, positions = memory.log.locate(0, torch.arange(len(memory)))
        inside = (numbers == passage.document.number) & (positions >= span.start) & (positions < span.stop)
        assert passage.mass == pytest.approx(float(mass[inside].sum() / mass.sum()), rel=1e-4)
        assert passage.lift == pytest.approx(float(corrected[inside].sum() / corrected.sum()), rel=1e-4)
    assert [passage.lift for passage in passages] == sorted((passage.lift for passage in passages), reverse=True)
    assert trace.passages(lm.new_memory(1)) == []


def test_a_capped_memory_points_at_what_it_still_holds() -> None:
    lm = reader(top_k=4, capacity=40)
    memory = read(lm, a=tokens(1, 64), b=tokens(1, 32, 1))
    with lm.record_attention() as trace:
        lm.generate(tokens(1, 30, 5), memory, max_new_tokens=6, do_sample=False, update_memory=True)
    numbers, _ = memory.log.locate(0, torch.arange(len(memory)))
    assert len(memory) == 40
    for passage in trace.passages(memory, length=8):
        assert passage.document.number in numbers.tolist()


def test_wrong_use_is_told() -> None:
    lm = reader(top_k=4)
    memory = lm.new_memory(2)
    lm.ingest(tokens(2, 30), memory)
    with lm.record_attention() as trace:
        lm.generate(tokens(2, 5, 1), memory, max_new_tokens=2, do_sample=False)
        with pytest.raises(SettingError, match="3 rows"):
            lm(tokens(3, 5), memory=memory.select_rows(torch.tensor([0, 1, 1])))
    with pytest.raises(SettingError, match="at least 1"):
        trace.passages(memory, top=0)
    with pytest.raises(SettingError, match="is not what was attended to"):
        trace.passages(memory.select_rows(torch.tensor([0, 1, 1])))


def test_beams_count_for_their_prompt() -> None:
    lm = reader(top_k=4)
    memory = read(lm, a=tokens(1, 40))
    with lm.record_attention() as trace:
        lm.generate(tokens(1, 6, 1), memory, max_new_tokens=3, num_beams=3, do_sample=False)
    mass, _ = trace.pair_mass(memory, queries="answer")
    # Two memory layers, four heads, three steps of three beams: each query gives at most 1.
    assert 0 < float(mass.sum()) <= 2 * 4 * 3 * 3
    assert trace.passages(memory)
