from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from lightning_fot.callbacks import RetrievalRecall, RetrievalSpeed
from lightning_fot.callbacks.probe import RetrievalProbe
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.retrieval import live_quality
from tests.support.callback_runs import WINDOW, Rows, loader, module, stream, trainer

HNSW = {"name": "hnsw", "min_index_size": 32}
SMALL: dict[str, Any] = {"tokens": 64, "queries": 8, "repeats": 2}


class Notes(Logger):
    """A logger that anyone might write."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int | None, dict[str, float]]] = []

    name = "notes"
    version = "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.kept.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return

    def steps_of(self, key: str) -> list[int | None]:
        return [step for step, metrics in self.kept if key in metrics]


def test_both_log_from_one_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall, speed = RetrievalRecall(**SMALL), RetrievalSpeed(**SMALL)
    measured: list[Any] = []
    measure = RetrievalProbe._measure
    monkeypatch.setattr(
        RetrievalProbe, "_measure", lambda self, *given: (measured.append(self), measure(self, *given))[1]
    )
    metrics = trainer(tmp_path, [recall, speed]).validate(module(retriever=HNSW), loader(), verbose=False)[0]
    assert measured == [recall]
    assert metrics["memory/tokens"] == 64
    for name in (
        "retrieval/recall@4", "retrieval/mass_recall", "retrieval/mass", "retrieval/sink_share",
        "retrieval/position0-15/recall@4", "retrieval/position0-15/mass",
    ):  # fmt: skip
        assert 0 <= metrics[name] <= 1
        layers = [metrics[name.replace("/", f"/layer{layer}/", 1)] for layer in (1, 3)]
        assert metrics[name] == pytest.approx(sum(layers) / 2)
    assert metrics["retrieval/mass"] <= metrics["retrieval/mass_recall"] + 1e-6
    assert metrics["retrieval/indexed_share"] == 1
    assert 0 < metrics["retrieval/search_ms_p50"] <= metrics["retrieval/search_ms_p99"]
    assert metrics["retrieval/qps"] > 0
    assert metrics["retrieval/bytes"] > 0
    assert 0 <= metrics["retrieval/rows_scanned"] < 64
    assert metrics["retrieval/fallbacks"] == 0
    assert [row["layer"] for row in speed.rows] == [1, 3]


def test_alone_each_logs_its_own_and_recall_times_nothing(tmp_path: Path) -> None:
    recall = trainer(tmp_path, [RetrievalRecall(**SMALL)]).validate(module(), loader(), verbose=False)[0]
    speed = trainer(tmp_path, [RetrievalSpeed(**SMALL)]).validate(module(), loader(), verbose=False)[0]
    assert "retrieval/recall@4" in recall
    assert "retrieval/qps" in speed
    assert not {"retrieval/qps", "retrieval/rows_scanned"} & set(recall)
    assert "retrieval/recall@4" not in speed
    # Exact search scores the whole bank for each query.
    assert speed["retrieval/rows_scanned"] == 64


def test_what_is_logged_is_what_a_memory_of_the_first_stream_gives(tmp_path: Path) -> None:
    model, recall = module(), RetrievalRecall(tokens=64, queries=10_000)
    trainer(tmp_path, [recall]).validate(model, loader(), verbose=False)
    lm, text = model.lm, stream()
    memory = lm.ingest(text[:, :64], memory=lm.new_memory(1))
    with lm.record_queries() as recorded:
        lm.ingest(text[:, 64 : 64 + WINDOW], memory=memory.snapshot())
    for row in recall.rows:
        number = row["layer"]
        wanted = live_quality(lm, number, memory.layers[number], recorded[number][0], sinks=True).as_dict()
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)
        # A window of 16 has one bucket.
        assert row["positions"]["0-15"]["mass"] == pytest.approx(wanted["mass"])


def test_test_measures_as_validation_does_and_again_the_same(tmp_path: Path) -> None:
    model, run = module(), trainer(tmp_path, [RetrievalRecall(**SMALL)])
    found = [
        run.validate(model, loader(), verbose=False)[0],
        run.validate(model, loader(), verbose=False)[0],
        run.test(model, loader(), verbose=False)[0],
    ]
    kept = [{key: value for key, value in metrics.items() if "retrieval" in key} for metrics in found]
    assert kept[0]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_with_and_without(tmp_path: Path, accumulate: int) -> None:
    states = []
    for name, callbacks in (
        ("with", [RetrievalRecall(tokens=32, every_n_steps=1, max_share=None), RetrievalSpeed(tokens=32, repeats=1)]),
        ("without", []),
    ):
        L.seed_everything(0, verbose=False)
        model = module(trainable="all")
        model.configure_model()
        # Attention dropout draws random numbers, and a frozen part in evaluation mode has to stay so.
        model.lm.model.config.attention_dropout = 0.1
        for layer in model.lm.attachment.attentions.values():
            layer.attention_dropout = 0.1
        run = trainer(tmp_path / name, list(callbacks), max_steps=4, accumulate_grad_batches=accumulate)
        model.train()
        model.lm.attachment.attentions[0].eval()
        run.fit(model, loader(8), loader())
        modes = [part.training for part in model.modules()]
        numbers = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
        states.append(([parameter.detach().clone() for parameter in model.parameters()], modes, numbers))
    assert all(torch.equal(ours, plain) for ours, plain in zip(states[0][0], states[1][0], strict=True))
    assert states[0][1:] == states[1][1:]
    with open(tmp_path / "with" / "lightning_logs" / "version_0" / "metrics.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert any(row["retrieval/recall@4"] for row in table)
    assert any(row["train/retrieval/recall@4"] for row in table)


def test_training_measures_each_optimiser_step_it_is_asked_for(tmp_path: Path) -> None:
    notes = Notes()
    probes = [RetrievalRecall(every_n_steps=2, max_share=None, **SMALL), RetrievalSpeed(**SMALL)]
    run = trainer(
        tmp_path, probes, logger=[notes, CSVLogger(tmp_path)], max_steps=6, accumulate_grad_batches=2,
        log_every_n_steps=12, limit_val_batches=0,
    )  # fmt: skip
    run.fit(module(), loader(12), loader())
    # Two batches a step, 32 tokens of the first stream each: from step 2 on there are 64 and a window.
    assert notes.steps_of("train/retrieval/recall@4") == notes.steps_of("train/retrieval/qps") == [1, 3, 5]
    assert notes.steps_of("retrieval/recall@4") == []


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_with_the_next_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    probe: dict[str, Any] = {"tokens": 32, "queries": 8, "every_n_steps": 1, "max_share": None}
    first, second = Notes(), Notes()
    run = trainer(tmp_path, [RetrievalRecall(**probe)], logger=first, max_steps=3, **settings)
    run.fit(module(), loader(12), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    run = trainer(tmp_path, [RetrievalRecall(**probe)], logger=second, max_steps=6, **settings)
    run.fit(module(), loader(12), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.steps_of("train/retrieval/recall@4") == [0, 1, 2]
    assert second.steps_of("train/retrieval/recall@4") == [3, 4, 5]


def test_what_training_has_not_paid_for_is_left_out(tmp_path: Path) -> None:
    notes = Notes()
    # One part in a million of seconds of training pays for no second measurement.
    recall = RetrievalRecall(every_n_steps=1, max_share=1e-6, **SMALL)
    run = trainer(tmp_path, [recall], logger=notes, max_steps=8, val_check_interval=4)
    run.fit(module(), loader(8), loader())
    assert len(notes.steps_of("train/retrieval/recall@4")) == 1
    assert notes.steps_of("retrieval/recall@4") == []
    assert "val/loss" in run.callback_metrics
    # Step 3 is the first with enough text; steps 4 to 8 and two validations are left out.
    assert recall.left_out == 7
    # Outside fit there is nothing to slow down.
    assert "retrieval/recall@4" in run.validate(module(), loader(), verbose=False)[0]


def test_the_sanity_check_measures_nothing(tmp_path: Path) -> None:
    notes = Notes()
    run = trainer(tmp_path, [RetrievalRecall(max_share=None, **SMALL)], logger=notes, num_sanity_val_steps=-1)
    run.fit(module(), loader(), loader())
    assert notes.steps_of("retrieval/recall@4") == [1]


def test_of_several_loaders_the_first_is_measured(tmp_path: Path) -> None:
    alone, several = RetrievalRecall(**SMALL), RetrievalRecall(**SMALL)
    model = module()
    trainer(tmp_path, [alone]).validate(model, loader(), verbose=False)
    trainer(tmp_path, [several]).validate(model, [loader(), loader(4, first=100)], verbose=False)
    assert alone.rows
    for one, other in zip(alone.rows, several.rows, strict=True):
        assert {**one, "add_s": 0} == {**other, "add_s": 0}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"capacity": 40}, {"overlap": 4, "sink_tokens": 2}])
def test_every_kind_of_memory_is_measured(tmp_path: Path, settings: dict[str, Any]) -> None:
    metrics = trainer(tmp_path, [RetrievalRecall(**SMALL)]).validate(module(**settings), loader(), verbose=False)[0]
    assert metrics["memory/tokens"] == settings.get("capacity", 64)
    assert metrics["retrieval/recall@4"] == 1
    # Where windows begin is known of whole windows alone.
    assert ("retrieval/sink_share" in metrics) == ("dtype" in settings)


def test_mixed_precision_is_measured_as_it_is_used(tmp_path: Path) -> None:
    recall = RetrievalRecall(**SMALL)
    run = trainer(tmp_path, [recall], precision="bf16-mixed")
    seen: list[torch.dtype] = []
    model = module()
    model.configure_model()
    projection = model.lm.attachment.attentions[0].q_proj
    handle = projection.register_forward_hook(lambda part, given, output: seen.append(output.dtype))
    run.validate(model, loader(), verbose=False)
    handle.remove()
    assert recall.rows
    assert set(seen) == {torch.bfloat16}


def test_a_memory_too_small_for_an_index_says_so(tmp_path: Path) -> None:
    metrics = trainer(tmp_path, [RetrievalRecall(**SMALL)]).validate(
        module(retriever={"name": "hnsw", "min_index_size": 1000}), loader(), verbose=False
    )[0]
    assert metrics["retrieval/indexed_share"] == 0
    assert metrics["retrieval/recall@4"] == 1


def test_a_model_without_memory_layers_logs_nothing(tmp_path: Path) -> None:
    recall = RetrievalRecall(every_n_steps=1, max_share=None, **SMALL)
    run = trainer(tmp_path, [recall, RetrievalSpeed()])
    run.fit(module(trainable="all", layers=()), loader(), loader())
    assert recall.rows == []
    assert not any("retrieval" in name for name in run.logged_metrics)


def test_too_little_text_logs_nothing(tmp_path: Path) -> None:
    class OneWindow(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {key: tensor[:, : WINDOW // 2] for key, tensor in super().__getitem__(index).items()}

    recall = RetrievalRecall()
    run = trainer(tmp_path, [recall])
    metrics = run.validate(module(), DataLoader(OneWindow(1), batch_size=None), verbose=False)[0]
    assert recall.rows == []
    assert not any(name.startswith("retrieval/") for name in metrics)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    class Other(L.LightningModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(SettingError, match="Other"):
        trainer(tmp_path, [RetrievalRecall()]).validate(Other(), loader(), verbose=False)


@pytest.mark.parametrize("name", ["tokens", "queries", "repeats", "every_n_steps"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_bad_counts_are_named(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"RetrievalSpeed\.{name}"):
        RetrievalSpeed(**{name: value})


@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, float("nan")])
def test_bad_shares_are_named(value: Any) -> None:
    with pytest.raises(SettingError, match=r"RetrievalRecall\.max_share"):
        RetrievalRecall(max_share=value)
