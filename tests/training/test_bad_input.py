"""A training that cannot go on stops with an error that names the cause, and leaves the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, CrossbatchDataModule, FocusedTransformer, MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.system.signals import StopGuard
from lightning_fot.training.job_callbacks import LastCheckpoint
from lightning_fot.training.run_folder import RunFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
MEMORY = MemoryConfig(memory_layers=[1, 3], window=16, top_k=8)
PACKED = CrossbatchConfig(pack=2, range=1)
BROKEN_BATCH = 3


class Breaks(L.Callback):
    """From one batch on the model, or what flows back through it, is infinite; notes which text the batch has."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.ids = torch.empty(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != BROKEN_BATCH:
            return
        self.ids = batch["input_ids"]
        if self.what == "loss":
            with torch.no_grad():
                pl_module.backbone.model.layers[3].mlp.down_proj.weight.fill_(torch.inf)
        else:
            weight = pl_module.backbone.model.layers[3].mlp.down_proj.weight
            weight.register_hook(lambda gradient: gradient * torch.inf)


def trainer(folder: Path, *callbacks: Any) -> L.Trainer:
    return L.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=True, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


def books(folder: Path) -> CrossbatchDataModule:
    """Texts of one letter each: the ids of a batch tell which files it reads."""
    folder.mkdir()
    for letter in "abcdefgh":
        (folder / f"{letter}.txt").write_text(letter * 50)
    return CrossbatchDataModule(
        paths=[str(folder)], tokenizer="tiny-random-llama", window=16, batch_size=4, pack=2,
        cache_dir=str(folder.parent / "cache"),
    )  # fmt: skip


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_what_is_not_finite_is_named_with_its_documents_and_the_checkpoint_before_it_stays(tmp_path, what):
    data, breaks = books(tmp_path / "books"), Breaks(what)
    folder = RunFolder(tmp_path / "run")
    keep = LastCheckpoint(folder, StopGuard(lambda text: None), every_s=0.0)
    with pytest.raises(SettingError) as caught:
        trainer(tmp_path, keep, breaks).fit(FocusedTransformer("tiny-random-llama", MEMORY, PACKED), datamodule=data)
    assert caught.value.setting == f"train/{what}"
    assert f"step {BROKEN_BATCH}" in caught.value.problem
    text = data.tokenizer_object.decode(breaks.ids.flatten(), skip_special_tokens=True)
    named = {f"{letter}.txt" for letter in "abcdefgh" if f"{letter}.txt" in caught.value.problem}
    assert named == {f"{letter}.txt" for letter in "abcdefgh" if letter in text}
    assert 0 < len(named) < 7
    saved = torch.load(folder.last_checkpoint, weights_only=True)
    assert saved["global_step"] == BROKEN_BATCH
    assert all(bool(torch.isfinite(part).all()) for part in saved["state_dict"].values())


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_batches_that_are_no_whole_packs_are_refused(tmp_path, verb):
    ids = torch.randint(3, 259, (3, 16), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": ids, "targets": ids}], batch_size=None)  # type: ignore[arg-type]
    module = FocusedTransformer("tiny-random-llama", MEMORY, PACKED)
    with pytest.raises(SettingError, match=r"pack=2: does not divide the 3 rows"):
        getattr(trainer(tmp_path), verb)(module, loader)


def test_more_contexts_than_rows_are_refused_at_the_first_step(tmp_path):
    data = books(tmp_path / "books")
    data = CrossbatchDataModule(
        paths=data.paths,
        tokenizer="tiny-random-llama",
        window=16,
        layout="paper",
        batch_size=4,
        cache_dir=data.cache_dir,
    )
    module = FocusedTransformer("tiny-random-llama", MEMORY, CrossbatchConfig(layout="paper", d=5))
    with pytest.raises(SettingError, match=r"crossbatch\.d=5: is more than the 4 rows"):
        trainer(tmp_path).fit(module, datamodule=data)


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    ids = torch.full((2, 16), 40_000)
    loader = DataLoader([{"input_ids": ids, "targets": ids}], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="outside the backbone's vocabulary"):
        trainer(tmp_path).fit(FocusedTransformer("tiny-random-llama", MEMORY, PACKED), loader)
