from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.evaluation.measures.by_position import position_buckets, quality_by_position
from lightning_fot.evaluation.measures.retrieval import (
    Capture,
    index_used,
    measure_live,
    retrieval_quality,
    sample_rows,
    skewness,
    window_starts,
)
from lightning_fot.evaluation.speed.timing import SearchTimes
from lightning_fot.memory.layer import MemoryLayer
from lightning_fot.pretrained import load_backbone


def tensors(banks: int = 2, keys: int = 200, queries: int = 30, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(banks, keys, dim, generator=generator), torch.randn(banks, queries, dim, generator=generator)


def exact_rows(keys: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    return (queries @ keys.transpose(1, 2)).topk(k, dim=-1).indices


def test_exact_rows_have_recall_one_and_their_softmax_mass() -> None:
    keys, queries = tensors()
    quality = retrieval_quality(keys, queries, exact_rows(keys, queries, 10))
    assert quality.recall == 1
    assert quality.mass_recall == pytest.approx(1)
    weights = (queries @ keys.transpose(1, 2) / 8**0.5).softmax(-1)
    assert quality.mass == pytest.approx(float(weights.topk(10).values.sum(-1).mean()), rel=1e-5)
    assert quality.queries == 60
    assert quality.sink_share is None


def test_missing_and_wrong_rows_count_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = tensors()
    rows = exact_rows(keys, queries, 10)
    rows[..., 5:] = -1
    half = retrieval_quality(keys, queries, rows)
    assert half.recall == pytest.approx(0.5)
    assert 0.5 < half.mass_recall < 1
    assert retrieval_quality(keys, queries, torch.full_like(rows, -1)).mass == 0
    monkeypatch.setattr("lightning_fot.evaluation.measures.retrieval.MAX_SCORES", 1000)
    in_parts = retrieval_quality(keys, queries, rows)
    assert in_parts.mass == pytest.approx(half.mass)
    assert in_parts.recall == half.recall


@pytest.mark.parametrize(
    ("dtype", "dropped"), [(torch.float32, [0, 0]), (torch.bfloat16, [7, 31]), (torch.int8, [5, 5])]
)
def test_a_layer_is_read_in_pieces_and_says_the_same(
    dtype: torch.dtype, dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_fot.evaluation.measures.retrieval.MAX_SCORES", 1000)
    generator = torch.Generator().manual_seed(1)
    layer = MemoryLayer.empty(2, 3, 8, 8, "exact", dtype, torch.device("cpu"))
    keys = torch.randn(2, 3, 150, 8, generator=generator)
    layer.append(keys, keys, torch.tensor([150, 120]))
    layer.drop_oldest(dropped)
    queries = torch.randn(6, 40, 8, generator=generator)
    rows = layer.search(queries.view(2, 3, 40, 8), 10).flatten(0, 1)
    rows[:, ::3, :4] = -1
    lengths = torch.tensor(layer.lengths).repeat_interleave(3)
    sinks = window_starts(150, 20)
    whole = retrieval_quality(layer.keys.flatten(0, 1), queries, rows, lengths=lengths, sink_rows=sinks)
    monkeypatch.setattr(MemoryLayer, "keys", property(lambda layer: pytest.fail("all keys were asked for")))
    pieces = retrieval_quality(layer, queries, rows, sink_rows=sinks)
    assert pieces.as_dict() == pytest.approx(whole.as_dict(), rel=1e-5)
    assert pieces.recall == pytest.approx(1 - 14 / 40 * 4 / 10, abs=1e-3)


def test_ties_do_not_count_as_misses_and_duplicates_count_once() -> None:
    keys = torch.ones(1, 6, 4)
    queries = torch.ones(1, 1, 4)
    assert retrieval_quality(keys, queries, torch.tensor([[[3, 5]]])).recall == 1
    assert retrieval_quality(keys, queries, torch.tensor([[[3, 3]]])).recall == 0.5


def test_k_beyond_the_keys_asks_for_all_of_them() -> None:
    keys, queries = tensors(keys=4)
    rows = torch.nn.functional.pad(exact_rows(keys, queries, 4), (0, 3), value=-1)
    quality = retrieval_quality(keys, queries, rows)
    assert (quality.recall, quality.mass) == (1, pytest.approx(1))


def test_ragged_banks_and_bfloat16() -> None:
    keys, queries = tensors()
    keys[1, 50:] = 1e6
    rows = torch.stack([exact_rows(keys[:1], queries[:1], 5)[0], exact_rows(keys[1:, :50], queries[1:], 5)[0]])
    assert retrieval_quality(keys, queries, rows, lengths=torch.tensor([200, 50])).recall == 1
    lengths = torch.tensor([200, 0])
    rows[1] = -1
    assert retrieval_quality(keys, queries, rows, lengths=lengths).recall == 1
    low = keys[:1].bfloat16()
    found = exact_rows(low.float(), queries[:1], 5)
    assert retrieval_quality(low, queries[:1], found).recall == 1


def test_sinks_and_hubs_are_seen() -> None:
    keys, queries = tensors(banks=1, keys=100, queries=50)
    # A key that every query finds first, at the start of the second window.
    queries[..., 0] = 1
    keys[0, 16] = torch.tensor([100.0] + [0.0] * 7)
    quality = retrieval_quality(keys, queries, exact_rows(keys, queries, 1), sink_rows=window_starts(100, 16))
    assert quality.sink_share == 1
    assert quality.hub_share == 1
    assert window_starts(40, 16).tolist() == [0, 16, 32]


def test_hubs_skew_how_often_keys_are_found() -> None:
    keys, queries = tensors(queries=300)
    rows = exact_rows(keys, queries, 10)
    # Radovanović et al. 2010, equation 1, bank by bank, in NumPy.
    wanted = []
    for bank in rows.numpy():
        counts = np.bincount(bank.reshape(-1), minlength=200)
        wanted.append(np.mean((counts - counts.mean()) ** 3) / counts.std() ** 3)
    assert retrieval_quality(keys, queries, rows).hub_skewness == pytest.approx(np.mean(wanted))
    assert skewness(torch.full((5,), 3)) == 0
    # Keys found at random, 15 times each on average.
    chance = torch.poisson(torch.full((200_000,), 15.0), generator=torch.Generator().manual_seed(0))
    assert skewness(chance) == pytest.approx(15**-0.5, rel=0.05)


def test_buckets_of_local_position_cover_the_window_once() -> None:
    assert position_buckets(1) == [(0, 15)]
    assert position_buckets(16) == [(0, 15)]
    assert position_buckets(300) == [(0, 15), (16, 63), (64, 255), (256, 1023)]


def test_quality_by_position_is_that_of_the_queries_that_stand_there() -> None:
    window, repeats = 80, 2
    with attach_memory(
        load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1], window=window, top_k=4)
    ) as lm:
        ids = torch.randint(3, 300, (1, 3 * window), generator=torch.Generator().manual_seed(0))
        memory = lm.ingest(ids[:, : 2 * window], memory=lm.new_memory(1))
        with lm.record_queries() as recorded:
            lm.ingest(ids[:, 2 * window :], memory=memory.snapshot())
        layer, queries = memory.layers[1], recorded[1][0]
        found = quality_by_position(lm, 1, layer, queries, window, count=10_000)
        assert list(found) == ["0-15", "16-63", "64-255"]
        # Folded queries are head by head: positions start again after each window.
        places = torch.arange(queries.shape[1]) % window
        weights = (queries @ layer.keys[0].transpose(1, 2) / 4).softmax(-1)
        best = weights.topk(4).values.sum(-1)
        for (first, last), quality in zip(position_buckets(window), found.values(), strict=True):
            here = (places >= first) & (places <= last)
            assert quality.mass == pytest.approx(float(best[:, here].mean()), rel=1e-4)
            assert quality.queries == 2 * repeats * (min(last, window - 1) - first + 1)
        few = quality_by_position(lm, 1, layer, queries, window, count=9)
        assert [quality.queries for quality in few.values()] == [6, 6, 6]


@pytest.mark.parametrize(
    "shapes",
    [((1, 0, 4), (1, 2, 4), (1, 2, 3)), ((1, 5, 4), (1, 2, 3), (1, 2, 3)), ((1, 5, 4), (1, 2, 4), (1, 3, 3))],
)
def test_bad_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    keys, queries, rows = shapes
    with pytest.raises(ValueError, match=r"disagree|at least one"):
        retrieval_quality(torch.zeros(keys), torch.zeros(queries), torch.zeros(rows, dtype=torch.int64))


def test_nothing_stored_is_refused() -> None:
    keys, queries = tensors(banks=1)
    with pytest.raises(ValueError, match="at least one key"):
        retrieval_quality(keys, queries, torch.zeros(1, 30, 2, dtype=torch.int64), lengths=torch.tensor([0]))


def test_sampled_rows_are_seeded_distinct_and_in_order() -> None:
    queries = torch.arange(100.0).reshape(1, 100, 1).repeat(2, 1, 1)
    sample = sample_rows(queries, 10)
    assert torch.equal(sample, sample_rows(queries, 10))
    assert torch.equal(sample[0], sample[1])
    assert (sample[0, 1:, 0] > sample[0, :-1, 0]).all()
    assert sample_rows(queries, 200) is queries


def test_percentiles() -> None:
    times = SearchTimes.from_seconds([step / 1000 for step in range(100, 0, -1)], 10)
    assert (times.p50_ms, times.p95_ms, times.p99_ms) == pytest.approx((50.5, 95, 99))
    assert times.qps == pytest.approx(10 / 0.0505)
    assert SearchTimes.from_seconds([0.002], 1).p99_ms == pytest.approx(2)


def test_a_capture_holds_real_queries_and_the_live_retriever_is_measured() -> None:
    window = 16
    config = MemoryConfig(memory_layers=[1, 3], window=window, top_k=4)
    with attach_memory(load_backbone("tiny-random-llama"), config) as lm:
        ids = torch.randint(3, 300, (1, 6 * window), generator=torch.Generator().manual_seed(0))
        plain = lm.ingest(ids[:, : 4 * window], memory=lm.new_memory(1))
        capture, memory, read = Capture(lm), lm.new_memory(1), []
        capture.ingest(ids[:, : 4 * window], memory, read.append)
        assert sum(read) == 4 * window
        for number, layer in memory.layers.items():
            torch.testing.assert_close(layer.keys, plain.layers[number].keys)
        with capture.target(memory):
            lm(ids[:, 4 * window :], memory=memory)
        heads, groups, dim = 4, 2, 16
        assert set(capture.past) == set(capture.queries) == {1, 3}
        assert capture.queries[1].shape == (groups, heads // groups * 2 * window, dim)
        layer, queries = capture.layer(3)
        row = measure_live(lm, 3, layer, queries, repeats=2)
        assert row["recall"] == 1
        assert row["mass_recall"] == pytest.approx(1, abs=1e-5)
        assert row["memory_tokens"] == 4 * window
        assert row["fallbacks"] == 0
        assert row["rows_scanned"] == 4 * window
        assert row["qps"] > 0
        untimed = measure_live(lm, 3, layer, queries, repeats=0)
        assert set(row) - set(untimed) == {"search_ms_p50", "search_ms_p95", "search_ms_p99", "qps"}
        assert index_used(memory) is None
