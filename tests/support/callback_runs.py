"""Small runs for the callbacks: batches, a module, a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig

WINDOW, PACK = 16, 2


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Batches whose rows are consecutive windows of two streams."""

    def __init__(self, count: int = 4, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 200, (2 * PACK, WINDOW), generator=torch.Generator().manual_seed(self.first + index))
        return {"input_ids": ids, "targets": ids.roll(-1, 1)}


def stream(count: int = 4, first: int = 0) -> torch.Tensor:
    """The first stream of so many batches, (1, n)."""
    rows = Rows(count, first)
    return torch.cat([rows[index]["input_ids"][:PACK].reshape(1, -1) for index in range(count)], dim=1)


def loader(count: int = 4, first: int = 0) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Rows(count, first), batch_size=None)


def module(trainable: Any = "memory_layers", layers: tuple[int, ...] = (1, 3), **kw: Any) -> FocusedTransformer:
    memory = MemoryConfig(memory_layers=list(layers), window=WINDOW, top_k=4, **kw)
    return FocusedTransformer("tiny-random-llama", memory, CrossbatchConfig(pack=PACK), trainable=trainable)


def trainer(folder: Path, callbacks: list[L.Callback], **kw: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "logger": CSVLogger(folder), "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1,
        "accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "use_distributed_sampler": False,
    }  # fmt: skip
    return L.Trainer(callbacks=callbacks, **{**settings, **kw})
