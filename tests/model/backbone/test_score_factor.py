"""``score_factor``: a factor on the scores of memory layers is one on their queries, in every way of reading."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.system.digests import KEY
from tests.support.models import WINDOW, settings, tiny_llama, tiny_qwen3, tokens

FACTOR = 2.5


def with_larger_queries(model: PreTrainedModel) -> PreTrainedModel:
    """The same model whose memory layers have queries ``FACTOR`` times as long."""
    with torch.no_grad():
        for layer in (1, 3):
            attention = model.model.layers[layer].self_attn
            norm = getattr(attention, "q_norm", None)
            (attention.q_proj if norm is None else norm).weight.mul_(FACTOR)
    return model


@pytest.mark.parametrize("make", [tiny_llama, pytest.param(tiny_qwen3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 5},
        {"overlap": 4, "sink_tokens": 2},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ({}, {"positions": "none"}, {"attending": "gate"})
        ),
    ],
)
def test_scores_times_a_factor_are_those_of_longer_queries(make, changes):
    ids, previous = tokens(2, 5 * WINDOW), tokens(4, WINDOW, seed=1)[:, None]
    table = [[0, 1], [1, 2], [2, 3], [3, 0]]
    found, prompt = [], tokens(1, 3 * WINDOW + 5)
    for model, factor in (
        (make().double(), FACTOR),
        (with_larger_queries(make().double()), 1.0),
        (make().double(), 1.0),
    ):
        with attach_memory(model, settings(**changes, score_factor=factor)) as lm:
            memory = lm.new_memory(2)
            read = lm(ids, memory=memory, update_memory=True).logits
            rows = lm.crossbatch(tokens(4, WINDOW), table, previous)
            gradients = torch.autograd.grad(rows.square().sum(), [model.model.layers[3].self_attn.v_proj.weight])
            with torch.no_grad():
                written = lm.generate(prompt, max_new_tokens=6)
        found.append((read, rows, *gradients, written))
    for one, same, other in zip(*found, strict=True):
        if one.dtype == torch.int64:
            assert torch.equal(one, same)
        else:
            assert torch.allclose(one, same, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_the_plain_backbone_has_no_factor():
    model, ids = tiny_llama(), tokens(1, 12)
    expected = model(ids).logits
    with attach_memory(model, settings(score_factor=FACTOR)):
        assert torch.equal(model(ids).logits, expected)


def test_what_is_measured_of_attention_has_the_factor_too():
    with attach_memory(tiny_llama(), settings(score_factor=FACTOR)) as lm:
        assert lm.attachment.attention_scale(1) == pytest.approx(FACTOR / 4)


def test_a_memory_of_another_factor_is_refused(tmp_path):
    ids = tokens(1, 3 * WINDOW)
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.ingest(ids, lm.new_memory()).save(tmp_path)
        lm.load_memory(tmp_path)
    with attach_memory(tiny_llama(), settings(score_factor=FACTOR)) as lm:
        with pytest.raises(SettingError, match="score_factor"):
            lm.load_memory(tmp_path)
        lm.ingest(ids, lm.new_memory()).save(tmp_path)
        lm.load_memory(tmp_path)
    index = tmp_path / "memory.json"
    with attach_memory(tiny_llama(), settings()) as lm:
        with pytest.raises(SettingError, match=r"score_factor: 2\.5 there, 1\.0 here"):
            lm.load_memory(tmp_path)
        lm.ingest(ids, lm.new_memory()).save(tmp_path)
        written = json.loads(index.read_text())
        del written[KEY], written["fingerprint"]["score_factor"]  # as memories were written before there was a factor
        index.write_text(json.dumps(written))
        assert len(lm.load_memory(tmp_path)) == 3 * WINDOW


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_a_factor_that_is_none_is_refused(value):
    with pytest.raises(SettingError, match=r"model\.memory\.score_factor.*above 0"):
        MemoryConfig(score_factor=value)
