"""Attention on the memory and its size, logged during training in a Trainer of the user's own."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_fot import CrossbatchConfig
from lightning_fot.callbacks import MemoryAttention, MemorySize
from lightning_fot.callbacks.sampled import streams
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.tasks.distraction import shares
from tests.support.callback_runs import PACK, WINDOW, Rows, loader, module, trainer


def test_attention_is_that_of_a_memory_of_the_batchs_streams(tmp_path: Path) -> None:
    model, attention = module(layers=(2,)), MemoryAttention(scored=2)
    logged = trainer(tmp_path, [attention]).validate(model, loader(), verbose=False)[0]
    assert {key for key in logged if key.startswith("memory/")} == {
        "memory/attention", "memory/own_share@2", "memory/own_share_found@2",
    }  # fmt: skip
    rows = Rows()[0]["input_ids"].reshape(2, PACK, WINDOW)
    lm = model.lm
    memory = lm.new_memory()
    for text in rows[:, :-1]:
        # A window of its own for each: below the one memory layer nothing reads the other.
        lm.ingest(text.reshape(1, -1), memory=memory)
    found = [shares(lm, memory, place * WINDOW, (place + 1) * WINDOW, rows[place, -1]) for place in (0, 1)]
    for key, field in (
        ("attention", "memory_mass"),
        ("own_share@2", "own_share"),
        ("own_share_found@2", "own_share_found"),
    ):
        assert logged[f"memory/{key}"] == pytest.approx(sum(one[field] for one in found) / 2, abs=1e-5)


def test_size_is_that_of_the_memory(tmp_path: Path) -> None:
    model = module(skip_window_start=1)
    logged = trainer(tmp_path, [MemorySize()]).validate(model, loader(), verbose=False)[0]
    memory = model.lm.ingest(Rows()[0]["input_ids"][:PACK].reshape(1, -1), model.lm.new_memory())
    assert logged["memory/text_tokens"] == len(memory) == PACK * (WINDOW - 1)
    assert logged["memory/bytes"] == memory.nbytes
    assert logged["memory/bytes_a_token"] == pytest.approx(memory.nbytes / len(memory))
    assert logged["memory/process_peak_bytes"] > memory.nbytes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_training_logs_them_and_is_the_same_without(tmp_path: Path) -> None:
    states = []
    for name in ("with", "without"):
        L.seed_everything(0, verbose=False)
        model = module(trainable="all")
        model.configure_model()
        callbacks = [MemoryAttention(every_n_steps=1, max_share=None), MemorySize(every_n_steps=2, max_share=None)]
        run = trainer(tmp_path / name, callbacks if name == "with" else [], max_steps=4)
        run.fit(model, loader(), loader())
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    file = next((tmp_path / "with").rglob("metrics.csv"))
    with file.open(newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    steps = {
        key: [int(row["step"]) for row in rows if row.get(key)]
        for key in ("train/loss", "train/memory/own_share@2", "train/memory/bytes")
    }
    assert steps == {
        "train/loss": [0, 1, 2, 3], "train/memory/own_share@2": [0, 1, 2, 3], "train/memory/bytes": [1, 3],
    }  # fmt: skip


def test_streams_of_both_layouts() -> None:
    ids = torch.arange(24).reshape(6, 4)
    contexts, targets = streams({"input_ids": ids}, CrossbatchConfig(pack=3))
    assert contexts.tolist() == [list(range(8)), list(range(12, 20))]
    assert targets.tolist() == [[8, 9, 10, 11], [20, 21, 22, 23]]
    paper = CrossbatchConfig(layout="paper", w=2)
    batch = {"input_ids": ids[:2], "previous_ids": ids[2:].reshape(2, 2, 4), "previous_valid": torch.ones(2, 2)}
    contexts, targets = streams(batch, paper)
    assert contexts.tolist() == [list(range(8, 16)), list(range(16, 24))]
    batch["previous_valid"][0, 1] = 0
    contexts, targets = streams(batch, paper)
    assert (contexts.tolist(), targets.tolist()) == ([list(range(16, 24))], [[4, 5, 6, 7]])
    assert streams({"input_ids": ids}, CrossbatchConfig(pack=1)) is None


def test_wrong_settings_and_modules_are_named(tmp_path: Path) -> None:
    for make, message in (
        (lambda: MemoryAttention(documents=0), r"MemoryAttention\.documents=0: must be a whole number of at least 1"),
        (lambda: MemorySize(every_n_steps=-1), r"MemorySize\.every_n_steps=-1"),
        (lambda: MemorySize(max_share=0), r"MemorySize\.max_share=0: must be above 0"),
    ):
        with pytest.raises(SettingError, match=message):
            make()
    with pytest.raises(SettingError, match=r"cannot measure a LightningModule"):
        MemorySize().setup(L.Trainer(logger=False, accelerator="cpu"), L.LightningModule(), "fit")
