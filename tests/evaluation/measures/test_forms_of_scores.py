"""Measures of attention follow the model: its own factor on scores, its soft cap, its sinks."""

from __future__ import annotations

import pytest
import torch

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.bench import load_metadata, measure_retriever, scale_of, softcap_of
from lightning_fot.bench.measure import Truth
from lightning_fot.evaluation.measures.multi_doc import own_share
from lightning_fot.evaluation.measures.recording import Recording, RecordSettings
from lightning_fot.evaluation.measures.retrieval import measure_live, retrieval_quality
from lightning_fot.evaluation.tasks.distraction import shares
from tests.support.decoder_types import tiny
from tests.support.models import tokens

FACTOR, CAP = 24**-0.5, 0.7
CONFIG = MemoryConfig(memory_layers=[3], window=16, top_k=8)


def capped(products: torch.Tensor) -> torch.Tensor:
    return CAP * torch.tanh(products.double() * FACTOR / CAP)


def gemma2():
    return tiny("gemma2", query_pre_attn_scalar=24, attn_logit_softcapping=CAP)


@pytest.mark.parametrize(
    ("name", "changes", "scale", "cap"),
    [
        ("llama", {}, 0.25, None),
        ("opt", {}, 1.0, None),  # it scales its queries, and says so to the interface
        ("gpt2", {"scale_attn_weights": False}, 1.0, None),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, 0.25 / 4, None),
        ("granite", {"attention_multiplier": 0.3}, 0.3, None),
        ("gemma2", {"query_pre_attn_scalar": 24, "attn_logit_softcapping": CAP}, FACTOR, CAP),
    ],
)
def test_the_scale_is_what_the_attention_interface_is_given(name, changes, scale, cap):
    with attach_memory(tiny(name, **changes), CONFIG) as lm:
        assert lm.attachment.attention_scale(3) == pytest.approx(scale)
        assert lm.attachment.softcap(3) == cap


@torch.no_grad()
def test_shares_and_masses_are_those_of_capped_scores():
    with attach_memory(gemma2(), CONFIG) as lm:
        memory = lm.ingest(tokens(1, 96), lm.new_memory())
        with lm.record_queries() as recorded:
            lm(tokens(1, 16, seed=1), memory=memory)
        (queries,) = recorded[3]
        layer = memory.layers[3]
        weights = capped(queries @ layer.keys[0].transpose(1, 2)).softmax(-1)
        expected = float(weights[..., 40:].sum(-1).mean())
        assert own_share(lm, memory, {3: queries}, {3: 40}) == pytest.approx(expected, abs=1e-6)
        row = measure_live(lm, 3, layer, queries, repeats=0)
        assert row["mass"] == pytest.approx(float(weights.topk(8).values.sum(-1).mean()), abs=1e-6)
        rows = layer.search(queries[None], 8)[0]
        rows[..., ::2] = -1
        found = weights.gather(2, rows.clamp_min(0)).masked_fill(rows < 0, 0).sum(-1)
        scale, cap = lm.attachment.attention_scale(3), lm.attachment.softcap(3)
        quality = retrieval_quality(layer, queries, rows, scale=scale, softcap=cap)
        assert quality.mass == pytest.approx(float(found.mean()), abs=1e-6)
        assert quality.mass_recall == pytest.approx(float((found / weights.topk(8).values.sum(-1)).mean()), abs=1e-6)


@torch.no_grad()
def test_keys_are_recorded_with_their_cap_and_judged_by_it(tmp_path):
    with attach_memory(gemma2(), CONFIG) as lm:
        recording = Recording(lm, RecordSettings(tokens=64, past=8, queries=32, dtype="float32"))
        recording.read(tokens(1, 400))
        found = recording.save(tmp_path / "qk.safetensors", "model", "text")
    metadata = load_metadata(tmp_path / "qk.safetensors")
    scale, cap = scale_of("L3h0", metadata), softcap_of("L3h0", metadata)
    assert (scale, cap) == (pytest.approx(FACTOR), pytest.approx(CAP))
    keys, queries = found["L3h0_keys"][None], found["L3h0_queries"][None]
    (row,) = measure_retriever("exact", keys, queries, k=4, scale=scale, softcap=cap, repeats=1)
    weights = capped(queries @ keys.transpose(1, 2)).softmax(-1)
    assert row["mass"] == pytest.approx(float(weights.topk(4).values.sum(-1).mean()), abs=1e-5)
    assert row["mass_recall"] == pytest.approx(1)


@torch.no_grad()
def test_a_sink_takes_its_share_of_all_attention():
    with attach_memory(tiny("gpt_oss"), CONFIG) as lm:
        sinks, found = lm.model.model.layers[3].self_attn.sinks, []
        for value in (-1e4, 1e4):
            sinks.fill_(value)
            # No sink of the top layer changes what is stored.
            memory = lm.ingest(tokens(1, 64), lm.new_memory())
            found.append(shares(lm, memory, 20, 64, tokens(1, 16, seed=1)[0]))
    none, all_of_it = found
    assert none["memory_mass"] > 0.05
    assert all_of_it["memory_mass"] == pytest.approx(0, abs=1e-6)
    # Of what goes to the memory, documents have the same shares.
    assert none["own_share"] == pytest.approx(all_of_it["own_share"])


def test_one_key_found_twice_counts_once_in_both_judges():
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 50, 8, generator=generator), torch.randn(1, 9, 8, generator=generator)
    best = (queries @ keys.transpose(1, 2)).topk(4, dim=-1).indices
    rows = best[..., :1].expand(-1, -1, 4)
    scores = Truth(keys, queries, 4).score(rows).means()
    quality = retrieval_quality(keys, queries, rows)
    assert scores["recall"] == quality.recall == 0.25
    assert scores["mass"] == pytest.approx(quality.mass, abs=1e-6)
    weights = (queries @ keys.transpose(1, 2) / 8**0.5).softmax(-1)
    expected = weights.max(-1).values / weights.topk(4).values.sum(-1)
    assert scores["mass_recall"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert quality.mass_recall == pytest.approx(float(expected.mean()), abs=1e-6)
