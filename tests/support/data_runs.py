"""A model and a trainer for tests of what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Recorder(pl.LightningModule):
    """Keeps the batches it was trained on; may interrupt itself before one."""

    def __init__(self, stop_before: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, torch.Tensor]] = []
        self.stop_before = stop_before

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.stop_before is not None and len(self.seen) >= self.stop_before:
            raise KeyboardInterrupt
        self.seen.append(batch)
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    checkpoint = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    settings = {"limit_val_batches": 0, **settings}
    return pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[checkpoint], enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
