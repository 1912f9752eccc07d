"""``memory_layers: all``: every layer whose attention sees the whole text in the plain model."""

from __future__ import annotations

import pytest
import torch

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from tests.support.decoder_types import tiny
from tests.support.models import settings, tiny_llama, tokens


def test_all_are_the_layers_by_their_numbers(tmp_path):
    """Also in the identity of a memory: what one reads the other takes."""
    model, ids = tiny_llama(), tokens(1, 40)
    with attach_memory(model, settings(memory_layers="all")) as lm:
        assert lm.memory_layers == (0, 1, 2, 3)
        memory = lm.ingest(ids, lm.new_memory())
        memory.save(tmp_path / "memory")
        expected = lm(ids, memory=memory).logits
    with attach_memory(model, settings(memory_layers=[0, 1, 2, 3])) as lm:
        assert torch.equal(lm(ids, memory=lm.load_memory(tmp_path / "memory")).logits, expected)


def test_layers_of_another_kind_are_none_of_them():
    """Convolutions, states, and attention that sees a sliding window."""
    for name, layers in (("lfm2", (1, 3)), ("gpt_oss", (1, 3))):
        with attach_memory(tiny(name), settings(memory_layers="all")) as lm:
            assert lm.memory_layers == layers, name


def test_of_a_model_of_sliding_windows_alone_they_are_all():
    with attach_memory(tiny("ministral", sliding_window=16), settings(memory_layers="all", window=16)) as lm:
        assert lm.memory_layers == (0, 1, 2, 3)
    with pytest.raises(SettingError, match=r"window=17: layer 0 .* sees 16 tokens back"):
        attach_memory(tiny("ministral", sliding_window=16), settings(memory_layers="all", window=17))


def test_a_model_that_sees_parts_alone_is_refused():
    model = tiny("gpt_oss")
    model.config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(SettingError, match=r"memory_layers='all': finds none in"):
        attach_memory(model, settings(memory_layers="all"))


def test_each_of_them_needs_its_retriever():
    spec = {"layers": {0: "exact", 1: "exact", 3: "exact"}}
    with pytest.raises(SettingError, match="lacks layer 2"):
        attach_memory(tiny_llama(), settings(memory_layers="all", retriever=spec))


def test_a_dense_memory_is_exact_search_for_everything():
    """Without a search: the same logits but for rounding, whatever ``top_k`` is, for rows of any length."""
    model, ids = tiny_llama(), tokens(3, 50)
    mask = torch.ones_like(ids)
    mask[1, :20] = mask[2, :49] = 0
    found = []
    for changes in ({"top_k": 4096}, {"top_k": 2, "dense_pairs": 4096}, {"top_k": 2}):
        with attach_memory(model, settings(memory_layers="all", **changes)) as lm, torch.no_grad():
            memory = lm.ingest(ids, lm.new_memory(3), attention_mask=mask)
            found.append(lm(tokens(3, 20, seed=1), memory=memory).logits)
    assert float((found[0] - found[1]).abs().max()) < 1e-5
    assert float((found[0] - found[2]).abs().max()) > 1e-2


def test_beyond_dense_pairs_the_best_are_searched():
    model, ids = tiny_llama(), tokens(1, 64)
    found = []
    for dense_pairs in (0, 15):
        with attach_memory(model, settings(top_k=2, dense_pairs=dense_pairs)) as lm, torch.no_grad():
            found.append(lm(ids).logits)
    assert torch.equal(found[0], found[1])


def test_yaml_takes_the_word():
    assert MemoryConfig(memory_layers="all").resolve_layers(3) == (0, 1, 2)
