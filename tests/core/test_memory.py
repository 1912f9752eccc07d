"""Memory as a value: snapshots, saving, loading, refusing what does not fit."""

import json

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from tests.core.models import settings, tiny_llama, tokens


@pytest.fixture
def lm():
    with attach_memory(tiny_llama(), settings(top_k=8)) as attached, torch.no_grad():
        yield attached


def test_snapshots_share_the_past_and_nothing_else(lm):
    memory = lm.ingest(tokens(1, 32), lm.new_memory())
    copies = [memory.snapshot() for _ in range(3)]
    before = memory.layers[3].keys.clone()
    for number, copy in enumerate(copies):
        lm.ingest(tokens(1, 16, seed=number + 1), copy)
    lm.ingest(tokens(1, 16, seed=9), memory)
    assert [len(copy) for copy in copies] == [48, 48, 48]
    for copy in [*copies, memory]:
        assert torch.equal(copy.layers[3].keys[:, :, :32], before)
    distinct = [copy.layers[3].keys[:, :, 32:] for copy in [*copies, memory]]
    assert all(not torch.equal(a, b) for n, a in enumerate(distinct) for b in distinct[n + 1 :])
    memory.reset()
    assert len(memory) == 0
    assert len(copies[0]) == 48


def test_saved_and_loaded_memory_answers_alike(lm, tmp_path):
    memory = lm.ingest(
        tokens(2, 40), lm.new_memory(2), attention_mask=torch.arange(40)[None] < torch.tensor([[40], [21]])
    )
    memory.save(tmp_path / "book")
    loaded = lm.load_memory(tmp_path / "book")
    assert loaded.lengths.tolist() == [40, 21]
    question = tokens(2, 9, seed=1)
    torch.testing.assert_close(lm(question, memory=loaded).logits, lm(question, memory=memory).logits)


def test_saving_again_replaces_the_old_one_whole(lm, tmp_path):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    lm.ingest(tokens(1, 40), lm.new_memory()).save(tmp_path)
    assert len(lm.load_memory(tmp_path)) == 40
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_save_that_dies_leaves_the_old_memory(lm, tmp_path, monkeypatch):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    import lightning_fot.persistence as persistence

    def dies(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(persistence, "_replace_text", dies)
    with pytest.raises(KeyboardInterrupt):
        lm.ingest(tokens(1, 40), lm.new_memory()).save(tmp_path)
    assert len(lm.load_memory(tmp_path)) == 20


def test_an_empty_memory_can_be_saved(lm, tmp_path):
    lm.new_memory().save(tmp_path)
    assert len(lm.load_memory(tmp_path)) == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_detected(lm, tmp_path, damage):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    (data,) = tmp_path.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[:-10])
    elif damage == "flip":
        content[-3] ^= 1
        data.write_bytes(content)
    else:
        data.unlink()
    with pytest.raises(SettingError, match="damaged"):
        lm.load_memory(tmp_path)


def test_another_model_is_refused_by_name(lm, tmp_path):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    with attach_memory(tiny_llama(seed=1), settings()) as other, pytest.raises(SettingError, match="weights differ"):
        other.load_memory(tmp_path)
    with (
        attach_memory(tiny_llama(), settings(memory_layers=[1])) as other,
        pytest.raises(SettingError, match="memory_layers"),
    ):
        other.load_memory(tmp_path)
    with (
        attach_memory(tiny_llama(), settings(positions="none")) as other,
        pytest.raises(SettingError, match="positions"),
    ):
        other.load_memory(tmp_path)


def test_folders_without_a_memory_or_with_a_broken_index(lm, tmp_path):
    with pytest.raises(SettingError, match=r"memory\.json"):
        lm.load_memory(tmp_path)
    (tmp_path / "memory.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(SettingError, match="damaged"):
        lm.load_memory(tmp_path)


@pytest.mark.parametrize("retriever", ["exact", "faiss_ivf", "hnsw", "scann"])
def test_every_retriever_serves_a_memory_through_snapshot_save_and_load(retriever, tmp_path):
    spec = {"name": retriever, "min_index_size": 64}
    ids, question = tokens(1, 400), tokens(1, 12, seed=1)
    with attach_memory(tiny_llama(), settings(top_k=16, retriever=spec)) as lm, torch.no_grad():
        memory = lm.ingest(ids, lm.new_memory())
        exact = lm.new_memory(retriever="exact")
        exact.append({number: (layer.keys, layer.values) for number, layer in memory.layers.items()})
        expected = lm(question, memory=exact).logits
        copy = memory.snapshot()
        memory.save(tmp_path)
        for answer in (memory, copy, lm.load_memory(tmp_path)):
            logits = lm(question, memory=answer).logits
            # Approximate neighbours move logits a little; wrong rows would move them by their spread.
            assert float((logits - expected).abs().mean()) < 0.25 * float(expected.std())
