from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig
from lightning_fot.callbacks import RetrievalRecall, RetrievalSpeed
from lightning_fot.errors import SettingError

WINDOW, PACK = 16, 2


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Batches whose rows are consecutive windows of two streams."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 200, (2 * PACK, WINDOW), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "targets": ids.roll(-1, 1)}


def module(**kw: Any) -> FocusedTransformer:
    memory = MemoryConfig(memory_layers=[1, 3], window=WINDOW, top_k=4, **kw)
    return FocusedTransformer("tiny-random-llama", memory, CrossbatchConfig(pack=PACK))


def trainer(folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", callbacks=callbacks, logger=CSVLogger(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=2, val_check_interval=2, log_every_n_steps=1,
        use_distributed_sampler=False,
    )  # fmt: skip


def loader() -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Rows(), batch_size=None)


def test_both_log_from_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall, speed = RetrievalRecall(tokens=64, queries=8, repeats=2), RetrievalSpeed(tokens=64, queries=8, repeats=2)
    model = module(retriever={"name": "hnsw", "min_index_size": 32})
    reads: list[Any] = []
    read = RetrievalRecall._read
    monkeypatch.setattr(
        "lightning_fot.callbacks.probe.RetrievalProbe._read",
        lambda self, module, batch: (reads.append(self), read(self, module, batch))[1],
    )
    run = trainer(tmp_path, [recall, speed])
    metrics = run.validate(model, loader(), verbose=False)[0]
    assert set(reads) == {recall}
    assert metrics["memory/tokens"] == 64
    for name in ("retrieval/recall@4", "retrieval/mass_recall", "retrieval/mass", "retrieval/sink_share"):
        assert 0 <= metrics[name] <= 1
        layers = [metrics[name.replace("/", f"/layer{layer}/")] for layer in (1, 3)]
        assert metrics[name] == pytest.approx(sum(layers) / 2)
    assert metrics["retrieval/mass"] <= metrics["retrieval/mass_recall"] + 1e-6
    assert metrics["retrieval/indexed_share"] > 0
    assert 0 < metrics["retrieval/search_ms_p50"] <= metrics["retrieval/search_ms_p99"]
    assert metrics["retrieval/qps"] > 0
    assert metrics["retrieval/bytes"] > 0
    assert metrics["retrieval/fallbacks"] == 0
    assert [row["layer"] for row in speed.rows] == [1, 3]


def test_the_memory_holds_the_first_stream_in_order() -> None:
    probe, model = RetrievalRecall(tokens=64), module()
    model.configure_model()
    for index in range(4):
        probe._read(model, Rows()[index])
    stream = torch.cat([Rows()[index]["input_ids"][:PACK].reshape(-1) for index in range(4)])
    assert probe._memory is not None
    assert len(probe._memory) == 64
    alone = model.lm.ingest(stream[None, :64], memory=model.lm.new_memory(1))
    for number, layer in alone.layers.items():
        torch.testing.assert_close(probe._memory.layers[number].keys, layer.keys)
    assert probe._waiting is not None
    torch.testing.assert_close(probe._waiting[0, :WINDOW], stream[64 : 64 + WINDOW])


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    weights = []
    for name, callbacks in (("with", [RetrievalRecall(tokens=32, repeats=1)]), ("without", [])):
        L.seed_everything(0)
        model = module()
        model.configure_model()
        model.train()
        run = trainer(tmp_path / name, list(callbacks))
        run.fit(model, loader(), loader())
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    logged = (tmp_path / "with" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "retrieval/recall@4" in logged.splitlines()[0]


def test_too_little_text_logs_nothing(tmp_path: Path) -> None:
    class OneWindow(Rows):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {key: tensor[:PACK, : WINDOW // 2] for key, tensor in super().__getitem__(index).items()}

    recall = RetrievalRecall()
    metrics = trainer(tmp_path, [recall]).validate(module(), DataLoader(OneWindow(), batch_size=None), verbose=False)[0]
    assert recall.rows == []
    assert not any(name.startswith("retrieval/") for name in metrics)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    class Other(L.LightningModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(SettingError, match="Other"):
        trainer(tmp_path, [RetrievalRecall()]).validate(Other(), loader(), verbose=False)


@pytest.mark.parametrize("name", ["tokens", "queries", "repeats"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"RetrievalSpeed\.{name}"):
        RetrievalSpeed(**{name: value})
