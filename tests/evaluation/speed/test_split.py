"""Where time goes, and what the machine allows: sums, what memories count, and bounds by their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_fot import EvaluationConfig, MemoryConfig, attach_memory
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.speed import limits
from lightning_fot.evaluation.speed.decoding import STEPS, measure_decoding, searched_exactly
from lightning_fot.evaluation.speed.split import PARTS, Split, Stopwatch, spent, split_rows
from lightning_fot.pretrained import load_backbone, load_tokenizer

WINDOW = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm():
    config = MemoryConfig(
        memory_layers=[1, 3], window=WINDOW, top_k=8, retriever={"name": "hnsw", "min_index_size": 100}
    )
    with attach_memory(load_backbone("tiny-random-llama"), config) as attached:
        yield attached


@pytest.fixture
def machine(monkeypatch):
    """A machine whose speed is known."""
    monkeypatch.setattr(limits, "read_rate", lambda device: 1e9)
    monkeypatch.setattr(limits, "product_rate", lambda device, dim: 1e10)


def _ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 200, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_every_step_of_every_memory_kind_is_divided_and_the_parts_are_the_whole(lm):
    config = EvaluationConfig(
        context_tokens=[128, 256], target_tokens=70, documents=1, passkey_tokens=[], retrieval_queries=8,
        retrieval_repeats=1, needles={"tokens": [600], "keys": 1, "asked": 1, "samples": 1},
    )  # fmt: skip
    documents = [SimpleNamespace(name="d", ids=_ids(400).numpy())]
    results = evaluate(lm, load_tokenizer("tiny-random-llama"), documents, config)
    rows = {(row["task"], row["step"], row["memory"], row["context_tokens"]): row for row in results["time_split"]}
    assert set(rows) == {
        ("perplexity", "scoring", "none", 0), ("needles", "asking", "none", 600),
        ("decoding", "decoding", "none", 0),
        *(("decoding", "decoding", kind, 256) for kind in ("hnsw", "exact")),
        *(("perplexity", step, kind, size) for step in ("reading", "scoring") for kind in ("hnsw", "exact")
          for size in (128, 256)),
        *(("needles", step, kind, 600) for step in ("reading", "asking") for kind in ("hnsw", "exact")),
    }  # fmt: skip
    for (_, step, kind, size), row in rows.items():
        assert sum(row[part] for part in PARTS) == pytest.approx(row["seconds"], rel=1e-6)
        assert all(row[part] >= 0 for part in PARTS)
        assert row["model_s"] > 0
        assert (row["search_s"] > 0) == (kind != "none")
        assert (row["insert_s"] > 0) == (kind != "none" and step != "decoding")
        if step == "reading" and size < 600:
            assert row["tokens"] == size
    assert {key for key, row in rows.items() if row["build_s"]} <= {key for key in rows if key[2] == "hnsw"}
    assert rows["perplexity", "reading", "hnsw", 256]["build_s"] > 0
    # What reading took is what the speeds are made of.
    for row in results["perplexity"]:
        if row["memory"] != "none":
            split = rows["perplexity", "reading", row["memory"], row["context_tokens"]]
            assert row["ingest_tokens_per_s"] == pytest.approx(split["tokens"] / split["seconds"])
    decoded = {row["memory"]: row for row in results["decoding"]}
    assert {kind: row["memory_tokens"] for kind, row in decoded.items()} == {"none": 0, "hnsw": 256, "exact": 256}
    for row in [*results["retrieval"], *results["exact"]]:
        assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["search_ms_p50"])


def test_a_memory_counts_what_it_does_and_a_copy_begins_anew(lm):
    memory = lm.new_memory()
    lm.ingest(_ids(200)[None], memory=memory)
    memory.flush()
    before = spent(memory)
    assert min(before.search_s, before.insert_s) > 0
    assert before.build_s + before.beside_s > 0
    assert spent(memory.snapshot()) == Split()
    watch = Stopwatch(CPU)
    with watch.running(memory):
        lm.ingest(_ids(64, 1)[None], memory=memory)
    after = spent(memory)
    assert watch.split.insert_s == pytest.approx(after.insert_s - before.insert_s)
    assert watch.split.search_s == pytest.approx(after.search_s - before.search_s)
    assert watch.split.insert_s + watch.split.search_s < watch.split.seconds
    # Counted by whoever knows the copy that did the work.
    copy = Stopwatch(CPU)
    with copy.running():
        copy.count(lm(_ids(30)[None], memory=memory).memory)
    assert copy.split.search_s > 0
    assert spent(memory) == after


def test_rows_of_a_phase_are_added_up():
    parts = [Split(4.0, 1.0, 0.5, 0.25, 9.0), Split(2.0, 1.0, 0.5, 0.25, 0.0)]
    record = [{"splits": {"reading": {"tokens": 10, **part.as_dict()}, "asking": {"tokens": 0, **Split().as_dict()}}}
              for part in parts]  # fmt: skip
    assert split_rows("needles", "exact", 64, [*record, {"no": "times"}]) == [
        {"step": "reading", "task": "needles", "context_tokens": 64, "memory": "exact", "tokens": 20, "seconds": 6.0,
         "search_s": 2.0, "insert_s": 1.0, "build_s": 0.5, "beside_s": 9.0, "model_s": 2.5}
    ]  # fmt: skip


def test_a_scan_is_bound_by_the_bytes_of_its_keys_or_by_its_products(machine):
    few = limits.scan_limit(2, 1000, 64, 3, 66, CPU)
    assert (few.by, few.amount, few.seconds) == ("bandwidth", 2 * 1000 * 66, pytest.approx(132e3 / 1e9))
    many = limits.scan_limit(2, 1000, 64, 512, 256, CPU)
    assert (many.by, many.amount) == ("products", 2 * 2 * 512 * 1000 * 64)
    assert many.seconds == pytest.approx(many.amount / 1e10)
    # 16 queries share what is read: 2·16·D operations a key at 1e10 take less than 4·D bytes at 1e9.
    assert limits.scan_limit(2, 1000, 64, 16, 256, CPU).by == "bandwidth"
    assert many.beside(2 * many.seconds)["of_limit"] == pytest.approx(0.5)


def test_bytes_of_a_key_are_those_that_are_read():
    assert limits.scanned_bytes(64, 4, 512, CPU) == 256
    assert limits.scanned_bytes(64, 2, 512, CPU) == 128
    assert limits.scanned_bytes(64, 1, 512, CPU) == 66
    assert limits.scanned_bytes(64, 4, 3, CPU) in (66, 256)  # by processor
    assert limits.scanned_bytes(64, 4, 3, torch.device("cuda")) == 256


def test_a_token_reads_the_weights_once_and_the_keys(lm, machine):
    weights = {id(tensor): tensor.numel() * tensor.element_size() for tensor in lm.model.state_dict().values()}
    embedding = lm.model.get_input_embeddings().weight
    tied = lm.model.get_output_embeddings().weight is embedding
    plain = limits.decoding_limit(lm, None)
    expected = sum(weights.values()) - embedding.nbytes * (1 if not tied else 0)
    assert plain.amount == (expected if not tied else sum(p.nbytes for p in lm.model.parameters()))
    memory = lm.ingest(_ids(200)[None], memory=lm.new_memory())
    fact = lm.attachment.facts[1]
    a_key = limits.scanned_bytes(fact.head_dim, 4, fact.heads // fact.kv_heads, CPU)
    assert limits.decoding_limit(lm, memory).amount - plain.amount == 2 * 200 * fact.kv_heads * a_key


def test_decoding_leaves_the_memory_and_reads_as_generate_does(lm):
    memory = lm.ingest(_ids(200)[None], memory=lm.new_memory())
    row = measure_decoding(lm, memory, _ids(60, 2))
    assert len(memory) == row["memory_tokens"] == 200
    assert row["splits"]["decoding"]["tokens"] == STEPS
    assert row["splits"]["decoding"]["seconds"] >= STEPS * 0.5 * row["ms_p50"] / 1e3
    assert measure_decoding(lm, memory, _ids(WINDOW // 4 + 2)) is None


@pytest.mark.parametrize("capacity", [None, 100])
def test_the_same_pairs_are_searched_exactly_without_a_copy(capacity):
    config = MemoryConfig(
        memory_layers=[1, 3],
        window=WINDOW,
        top_k=8,
        capacity=capacity,
        retriever={"name": "hnsw", "min_index_size": 90},
    )
    with attach_memory(load_backbone("tiny-random-llama"), config) as lm:
        memory = lm.ingest(_ids(200)[None], memory=lm.new_memory())
        memory.flush()
        exact = searched_exactly(memory)
        queries = torch.randn(1, memory.layers[1].kv_heads, 5, 16, generator=torch.Generator().manual_seed(0))
        queries = queries[..., :1].expand(-1, -1, -1, memory.layers[1].key_store.dim).contiguous()
        for number, layer in exact.layers.items():
            assert layer.retriever.exact
            keys = memory.layers[number].keys
            assert torch.equal(layer.keys, keys)
            best = (queries @ keys.transpose(2, 3)).topk(8).values.sum(-1)
            found = layer.gather(layer.search(queries, 8)).keys
            assert torch.allclose((queries[..., None, :] * found).sum((-1, -2)), best, rtol=1e-4)
            if capacity is None:
                assert layer.keys.data_ptr() == keys.data_ptr()
        assert not memory.layers[1].retriever.exact


def test_the_machine_is_measured_once():
    rates = limits.read_rate("cpu"), limits.product_rate("cpu", 64)
    assert all(np.isfinite(rate) and rate > 1e6 for rate in rates)
    assert rates == (limits.read_rate("cpu"), limits.product_rate("cpu", 64))
