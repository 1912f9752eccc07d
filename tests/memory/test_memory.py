"""Memory as a value: snapshots, saving, loading, refusing what does not fit."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.memory.token_log import TokensRead
from tests.support.models import settings, tiny_llama, tokens


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
    # The files of the save before stay, for whoever has just read which they are; those before them do not.
    lm.ingest(tokens(1, 60), lm.new_memory()).save(tmp_path)
    kept = ["README.md", "log", "log", "memory", "memory", "memory.json"]
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == kept


def test_files_that_only_look_like_a_memorys_are_kept(lm, tmp_path):
    theirs = ("memory-of-my-cat.safetensors", "log-2024-01.safetensors", "model.safetensors", "notes.part")
    for name in theirs:
        (tmp_path / name).write_text("mine")
    for length in (20, 40, 60):
        lm.ingest(tokens(1, length), lm.new_memory()).save(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)


def test_leftovers_of_killed_saves_go_with_the_next_one(lm, tmp_path):
    (tmp_path / "tmpab12_xyz.part").touch()
    (tmp_path / ".memory.json.0123456789abcdef.part").mkdir()
    (tmp_path / ".memory.json.0123456789abcdef.part" / "memory.json").touch()
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_reader_goes_on_with_what_a_writer_has_saved_meanwhile(lm, tmp_path, monkeypatch, saves):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    import lightning_fot.memory.on_disk as persistence

    load, pending = persistence._load, list(range(saves))

    def saved_beside(*arguments):
        while pending:
            number = pending.pop()
            lm.ingest(tokens(1, 30 + number, seed=number), lm.new_memory()).save(tmp_path)
        return load(*arguments)

    monkeypatch.setattr(persistence, "_load", saved_beside)
    # One save leaves what the reader has begun with; after two it begins again.
    assert len(lm.load_memory(tmp_path)) == (20 if saves == 1 else 30)


def test_an_index_that_names_files_elsewhere_is_refused(lm, tmp_path):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "memory.json").read_text())
    index["log"]["file"] = f"../b/{index['log']['file']}"
    del index["sha256"]
    (tmp_path / "a" / "memory.json").write_text(json.dumps(index))
    with pytest.raises(SettingError, match="no data file of a memory"):
        lm.load_memory(tmp_path / "a")


def test_a_save_that_dies_leaves_the_old_memory(lm, tmp_path, monkeypatch):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    import lightning_fot.memory.on_disk as persistence

    def dies(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(persistence, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        lm.ingest(tokens(1, 40), lm.new_memory()).save(tmp_path)
    assert len(lm.load_memory(tmp_path)) == 20


def test_an_empty_memory_can_be_saved(lm, tmp_path):
    lm.new_memory().save(tmp_path)
    assert len(lm.load_memory(tmp_path)) == 0


@pytest.mark.parametrize("file", ["memory", "log"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_detected(lm, tmp_path, damage, file):
    lm.ingest(tokens(1, 20), lm.new_memory()).save(tmp_path)
    (data,) = tmp_path.glob(f"{file}-*.safetensors")
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
    with pytest.raises(SettingError, match="format 1"):
        lm.load_memory(tmp_path)
    for broken in ("{", "[]", json.dumps({"format": 2})):
        (tmp_path / "memory.json").write_text(broken)
        with pytest.raises(SettingError, match="damaged"):
            lm.load_memory(tmp_path)


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_saving_again_writes_only_what_is_new(tmp_path, dtype):
    with attach_memory(tiny_llama(), settings(dtype=dtype)) as lm, torch.no_grad():
        memory = lm.ingest(tokens(1, 64), lm.new_memory(), document="first")
        memory.save(tmp_path)
        (first,) = tmp_path.glob("memory-*.safetensors")
        lm.ingest(tokens(1, 32, seed=1), memory, document="second")
        memory.save(tmp_path)
        files = sorted(tmp_path.glob("memory-*.safetensors"), key=lambda path: path.stat().st_size)
        assert len(files) == 2
        assert first in files
        assert files[0].stat().st_size < 0.7 * files[1].stat().st_size
        loaded = lm.load_memory(tmp_path)
        for number, layer in memory.layers.items():
            assert torch.equal(loaded.layers[number].keys, layer.keys)
            assert torch.equal(loaded.layers[number].values, layer.values)
        assert [(known.name, known.stored) for known in loaded.documents] == [("first", 64), ("second", 32)]
        # A loaded memory goes on like the one that was saved, and so does its folder.
        for one in (memory, loaded):
            lm.ingest(tokens(1, 16, seed=2), one, document="second")
        loaded.save(tmp_path)
        again = lm.load_memory(tmp_path)
        assert torch.equal(again.layers[3].keys, memory.layers[3].keys)
        assert len(list(tmp_path.glob("memory-*.safetensors"))) == 3


def test_another_memory_in_the_folder_is_not_continued(lm, tmp_path):
    memory = lm.ingest(tokens(1, 32), lm.new_memory())
    memory.save(tmp_path)
    other = lm.ingest(tokens(1, 48, seed=5), lm.new_memory())
    other.save(tmp_path)
    lm.ingest(tokens(1, 16, seed=1), memory).save(tmp_path)
    assert torch.equal(lm.load_memory(tmp_path).layers[1].keys, memory.layers[1].keys)


def test_a_reset_or_forgetful_memory_is_saved_whole(lm, tmp_path):
    memory = lm.ingest(tokens(1, 32), lm.new_memory(), document="a")
    lm.ingest(tokens(1, 32, seed=1), memory, document="b")
    memory.save(tmp_path)
    memory.forget("a")
    memory.save(tmp_path)
    assert torch.equal(lm.load_memory(tmp_path).layers[1].keys, memory.layers[1].keys)
    memory.reset()
    lm.ingest(tokens(1, 40, seed=2), memory)
    memory.save(tmp_path)
    assert torch.equal(lm.load_memory(tmp_path).layers[1].keys, memory.layers[1].keys)


KILLED = """
import sys, torch
from lightning_fot import attach_memory
from tests.support.models import settings, tiny_llama, tokens
with attach_memory(tiny_llama(), settings(top_k=8)) as lm, torch.no_grad():
    memory = lm.new_memory()
    for step in range(10_000):
        lm.ingest(tokens(1, 16, seed=step), memory)
        memory.save(sys.argv[1])
        print(len(memory), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.01, 0.05])
def test_a_kill_at_any_moment_leaves_a_whole_memory(lm, tmp_path, delay):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        said = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split() if line.isdigit()]
    memory = lm.load_memory(tmp_path)
    # What was said to be saved is there; a save that was under way may be there too.
    assert len(memory) in (said[-1], said[-1] + 16)
    expected = lm.new_memory()
    for step in range(len(memory) // 16):
        lm.ingest(tokens(1, 16, seed=step), expected)
    torch.testing.assert_close(memory.layers[3].keys, expected.layers[3].keys, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("retriever", ["exact", {"name": "hnsw", "min_index_size": 64}])
@pytest.mark.parametrize("rows", [1, 2])
def test_capacity_keeps_exactly_the_newest(retriever, rows):
    ids = tokens(rows, 400)
    with attach_memory(tiny_llama(), settings(capacity=100, retriever=retriever)) as lm, torch.no_grad():
        memory, whole = lm.new_memory(rows), lm.new_memory(rows, retriever="exact")
        whole.capacity = None
        for start in range(0, 400, 16):
            part = ids[:, start : start + 16]
            pairs = {n: (torch.randn(rows, 2, part.shape[1], 16), torch.randn(rows, 2, 16, 16)) for n in (1, 3)}
            for one in (memory, whole):
                one.append(pairs)
            assert len(memory) == min(100, start + 16)
            for number, layer in memory.layers.items():
                newest = whole.layers[number].keys[:, :, -100:]
                assert torch.equal(layer.keys, newest)
                queries = newest[:, :, ::7] * 3
                found = layer.search(queries, 5)
                assert int(found.max()) < len(memory)
                exact = (queries @ newest.transpose(2, 3)).topk(5).indices
                overlap = (found[..., :, None] == exact[..., None, :]).any(-1).float().mean()
                assert float(overlap) == 1.0 if retriever == "exact" else float(overlap) > 0.7
                assert torch.equal(layer.gather(found).values, gathered(layer.values, found))
        assert int(memory.forgotten[0]) == 300


def gathered(values, rows):
    return (
        values[:, :, None]
        .expand(-1, -1, rows.shape[2], -1, -1)
        .gather(3, rows[..., None].expand(*rows.shape, values.shape[-1]))
    )


def test_forgetting_a_document_leaves_the_others_as_if_it_had_not_been_read(lm):
    memory, others = lm.new_memory(), lm.new_memory()
    texts = {name: tokens(1, 40, seed=seed) for seed, name in enumerate("abc")}
    for name, text in texts.items():
        # Each from an empty memory, so that no document depends on those before.
        alone = lm.ingest(text, lm.new_memory(), document=name)
        pairs = {number: (layer.keys, layer.values) for number, layer in alone.layers.items()}
        memory.log.begin([name])
        memory.append(pairs, read=TokensRead(text, torch.ones(1, 40).bool(), torch.ones(1, 40).bool()))
        if name != "b":
            others.append(pairs)
    assert memory.forget("b") == 40
    assert [known.name for known in memory.documents] == ["a", "c"]
    question = tokens(1, 10, seed=9)
    torch.testing.assert_close(lm(question, memory=memory).logits, lm(question, memory=others).logits)
    assert memory.log.locate(0, torch.tensor([40]))[1].tolist() == [0]
    with pytest.raises(SettingError, match=r"'b'.*holds: a, c"):
        memory.forget("b")


def test_eight_bits_a_coordinate_stay_close():
    ids, question = tokens(1, 300), tokens(1, 16, seed=1)
    logits, sizes = {}, {}
    for dtype in ("float32", "bfloat16", "int8"):
        with attach_memory(tiny_llama(), settings(dtype=dtype)) as lm, torch.no_grad():
            memory = lm.ingest(ids, lm.new_memory())
            logits[dtype] = lm(question, memory=memory).logits
            sizes[dtype] = sum(
                s.nbytes for layer in memory.layers.values() for s in (layer.key_store, layer.value_store)
            )
    assert float((logits["int8"] - logits["float32"]).abs().max()) < 5e-2
    # One byte a coordinate and two a vector of 16: 18 bytes where float32 takes 64.
    assert sizes["int8"] * 64 == sizes["float32"] * 18


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["values", "all"])
def test_memory_in_a_file_answers_as_in_ram(tmp_path, offload):
    ids, question = tokens(2, 700), tokens(2, 16, seed=1)
    with attach_memory(tiny_llama(), settings(top_k=16)) as lm, torch.no_grad():
        expected = lm(question, memory=lm.ingest(ids, lm.new_memory(2))).logits
    changes = {"top_k": 16, "offload_dir": str(tmp_path / "pages"), "offload": offload}
    with attach_memory(tiny_llama(), settings(**changes)) as lm, torch.no_grad():
        memory = lm.ingest(ids, lm.new_memory(2))
        assert torch.equal(lm(question, memory=memory).logits, expected)
        assert list((tmp_path / "pages").iterdir()) == []
        memory.save(tmp_path / "book")
        loaded = lm.load_memory(tmp_path / "book")
        lm.ingest(tokens(2, 32, seed=3), loaded)
        lm.ingest(tokens(2, 32, seed=3), memory)
        assert torch.equal(lm(question, memory=loaded).logits, lm(question, memory=memory).logits)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with attach_memory(tiny_llama(), settings(offload_dir=str(tmp_path))) as lm, torch.no_grad():
        memory = lm.ingest(tokens(1, 200), lm.new_memory())
        before = memory.layers[3].keys.clone()
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SettingError, match=r"offload_dir.*No space left"):
            lm.ingest(tokens(1, 400, seed=1), memory)
        # Whole windows that fitted stay; the window that did not leaves no trace in any layer.
        assert {layer.lengths[0] for layer in memory.layers.values()} == {len(memory)}
        assert len(memory) % 16 == 8
        assert torch.equal(memory.layers[3].keys[:, :, :200], before)
        assert int(memory.tokens_seen) == len(memory)


def test_pairs_that_do_not_fit_are_refused_and_leave_no_trace(lm):
    memory = lm.ingest(tokens(1, 20), lm.new_memory())
    good = (torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16))
    bad = {
        "lacks memory layers": {1: good},
        "keys": {1: good, 3: (good[0][..., :8], good[1])},
        "values": {1: good, 3: (good[0], good[1][:, :, :2])},
        "nan or inf": {1: good, 3: (good[0].clone().fill_(torch.nan), good[1])},
    }
    for named, pairs in bad.items():
        with pytest.raises(SettingError, match=named):
            memory.append(pairs)
        assert [layer.lengths for layer in memory.layers.values()] == [[20], [20]]
    with pytest.raises(SettingError, match="lengths"):
        memory.append({1: good, 3: good}, torch.tensor([5]))


@pytest.mark.slow
@pytest.mark.parametrize("retriever", ["exact", "hnsw", "faiss_ivf"])
def test_chosen_rows_share_what_is_stored_and_go_on_apart(retriever):
    with (
        attach_memory(tiny_llama(), settings(retriever={"name": retriever, "min_index_size": 64})) as lm,
        torch.no_grad(),
    ):
        memory = lm.ingest(tokens(2, 1200), lm.new_memory(2))
        question = tokens(3, 9, seed=4)
        lm(question[:2], memory=memory)
        chosen = memory.select_rows(torch.tensor([1, 1, 0]))
        added = tokens(3, 16, seed=5)
        lm.ingest(added, chosen)
        logits = lm(question, memory=chosen).logits
        for row, origin in enumerate([1, 1, 0]):
            alone = memory.select_rows(torch.tensor([origin]))
            lm.ingest(added[row : row + 1], alone)
            tolerance = 1e-4 if retriever == "exact" else 0.3
            torch.testing.assert_close(
                lm(question[row : row + 1], memory=alone).logits, logits[row : row + 1], atol=tolerance, rtol=1e-4
            )
        assert memory.lengths.tolist() == [1200, 1200]
        shared = memory.layers[1].key_store._parts[0].segment
        assert chosen.layers[1].key_store._parts[0].segment is shared
