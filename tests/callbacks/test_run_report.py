"""The page that a Trainer of the user's own writes as it goes."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fot.callbacks import MemorySize, RetrievalRecall, RetrievalSpeed, RunReport
from lightning_fot.cli import main
from lightning_fot.errors import SettingError
from tests.support.callback_runs import loader, module, trainer
from tests.support.page_reader import Reader

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")


def _fit(folder: Path, callbacks: list[L.Callback], **kw: Any) -> L.Trainer:
    run = trainer(folder, callbacks, **{"max_steps": 4, **kw})
    run.fit(module(trainable="all"), loader(), loader(2, first=50))
    return run


def test_it_shows_what_was_logged_and_what_the_callbacks_measured(tmp_path: Path) -> None:
    report, recall = RunReport(), RetrievalRecall(tokens=32, queries=8, max_share=None)
    speed = RetrievalSpeed(tokens=32, queries=8, repeats=2, max_share=None)
    run = _fit(tmp_path, [recall, speed, MemorySize(every_n_steps=2, max_share=None), report])
    folder = Path(run.logger.log_dir) / "report"
    assert report.written == folder / "report.html"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    logged = {row["name"]: row for row in results["metrics"]}
    with (Path(run.logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        kept = [float(row["train/loss"]) for row in csv.DictReader(file)]
    assert kept == pytest.approx(losses, rel=1e-5)
    assert (logged["train/loss"]["first"], logged["train/loss"]["last"]) == pytest.approx((losses[0], losses[-1]))
    assert results["training"] == {"steps": 4, "loss_first": kept[0], "loss_last": kept[-1]}
    assert logged["val/loss"]["n"] == 2
    assert logged["val/loss"]["last"] == pytest.approx(float(run.callback_metrics["val/loss"]))
    assert logged["memory/bytes"]["last"] > 0
    assert [row["recall"] for row in results["retrieval_in_run"]] == [row["recall"] for row in recall.rows]
    assert all("search_ms_p50" in row for row in results["retrieval_in_run"])
    reader = Reader(report.written.read_text(encoding="utf-8"))
    assert "Training of tiny-random-llama" in reader.words
    assert "Everything logged" in reader.words
    assert "Not measured" not in reader.words
    assert next(row for row in reader.rows if row[:1] == ["val/loss"])[5] == "2"
    assert any(tag == "svg" and (a.get("aria-label") or "").startswith("Loss") for tag, a in reader.tags)
    assert main(["report", str(folder)]) == 0


def test_it_needs_neither_logger_nor_other_callbacks_and_validation_alone_writes_too(tmp_path: Path) -> None:
    report = RunReport(title="Mine & yours")
    run = trainer(tmp_path, [report], logger=False, default_root_dir=tmp_path)
    (scores,) = run.validate(module(), loader(2), verbose=False)
    assert report.written == tmp_path / "report" / "report.html"
    results = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    shown = {row["name"]: row["last"] for row in results["metrics"]}
    assert shown["val/loss"] == pytest.approx(scores["val/loss"])
    assert "Mine & yours" in Reader(report.written.read_text(encoding="utf-8")).words
    run.test(run.lightning_module, loader(2), verbose=False)
    results = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    assert any(row["name"].startswith("test/") for row in results["metrics"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_what_was_kept_goes_on_with_a_resumed_training(tmp_path: Path) -> None:
    run = _fit(tmp_path / "a", [RunReport()], max_steps=2)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again, whole = RunReport(tmp_path / "again"), RunReport(tmp_path / "whole")
    other = trainer(tmp_path / "b", [again], max_steps=4)
    other.fit(
        module(trainable="all"), loader(), loader(2, first=50), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    _fit(tmp_path / "c", [whole])
    tables = [(tmp_path / name / "metrics.csv").read_text(encoding="utf-8") for name in ("again", "whole")]
    steps = [[row["step"] for row in csv.DictReader(table.splitlines())] for table in tables]
    assert steps[0] == steps[1] == ["0", "1", "2", "3"]


class Plain(L.LightningModule):
    """A module that knows nothing of memories."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_any_module_that_logs_will_do(tmp_path: Path) -> None:
    report = RunReport(tmp_path / "page")
    batches = torch.utils.data.DataLoader(torch.ones(6, 2), batch_size=2)
    trainer(tmp_path, [report], max_steps=3, val_check_interval=None).fit(Plain(), batches)
    words = Reader((tmp_path / "page" / "report.html").read_text(encoding="utf-8")).words
    assert "Training of Plain" in words
    assert "Crossbatch" not in words
    shown = json.loads((tmp_path / "page" / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert [(row["name"], row["n"]) for row in shown] == [("train/loss", 3)]


def test_it_writes_nothing_where_nothing_is_meant_to_be_kept(tmp_path: Path) -> None:
    folder = tmp_path / "page"
    _fit(tmp_path, [RunReport(folder)], fast_dev_run=True)
    assert not folder.exists()
    seen: list[bool] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(folder.exists())

    _fit(tmp_path, [RunReport(folder), Look()], num_sanity_val_steps=1)
    assert seen == [False]
    assert sorted(os.listdir(folder)) == ["metrics.csv", "report.html", "results.json"]
    with pytest.raises(SettingError, match="is a file"):
        _fit(tmp_path, [RunReport(folder / "report.html")])
