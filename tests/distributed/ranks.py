"""Trains on as many processes as it is told, and writes the weights. Run by a test: see test_training."""

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig

STEPS, ROWS = 3, 4


def rows(layout: str) -> dict[str, torch.Tensor]:
    """All rows of all steps and ranks, (STEPS, 2 * ROWS, ...)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (STEPS, 2 * ROWS, 17), generator=generator)
    batch = {"input_ids": ids[..., :-1], "targets": ids[..., 1:]}
    if layout == "paper":
        batch["previous_ids"] = torch.randint(3, 259, (STEPS, 2 * ROWS, 1, 16), generator=generator)
        batch["previous_valid"] = torch.ones(STEPS, 2 * ROWS, 1, dtype=torch.bool)
        batch["previous_valid"][:, 5] = False
    return batch


class Batches(torch.utils.data.Dataset):
    """Batches of this rank; of one process: whole ones, or what the ranks would have had, one after the other."""

    def __init__(self, layout: str, whole: bool) -> None:
        self.rows = rows(layout)
        self.whole = whole

    def __len__(self) -> int:
        return STEPS if self.whole or torch.distributed.is_initialized() else 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, rank = index, 0
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        elif self.whole:
            return {name: part[step] for name, part in self.rows.items()}
        else:
            step, rank = divmod(index, 2)
        return {name: part[step, rank * ROWS : (rank + 1) * ROWS] for name, part in self.rows.items()}


def train(folder: Path, layout: str, across: bool, ranks: int, strategy: str | Strategy) -> None:
    """Three steps of SGD; rank 0 writes the weights and the losses of validation."""
    L.seed_everything(1, verbose=False)
    crossbatch = CrossbatchConfig(
        layout=layout, pack=4, range=3, stepping=False, d=6 if across else 3, across_ranks=across
    )
    module = FocusedTransformer(
        "tiny-random-llama",
        MemoryConfig(memory_layers=[1, 3], window=16, top_k=8),
        crossbatch,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        trainable="from_first_memory_layer",
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy if ranks > 1 else "auto", max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, num_sanity_val_steps=0,
        accumulate_grad_batches=1 if across or ranks > 1 else 2,
    )  # fmt: skip
    loader = DataLoader(Batches(layout, whole=across), batch_size=None)
    trainer.fit(module, loader, loader)
    weights = {
        name: part.full_tensor() if isinstance(part, DTensor) else part.detach().clone()
        for name, part in module.named_parameters()
        if part.requires_grad
    }
    if trainer.is_global_zero:
        sharded = any(isinstance(part, DTensor) for part in module.parameters())
        name = f"{layout}-{'across' if across else 'inside'}-{ranks}{'-sharded' if sharded else ''}"
        torch.save(weights, folder / f"{name}.pt")
        loss = float(trainer.callback_metrics["val/loss"])
        (folder / f"{name}.json").write_text(json.dumps(loss))


def main(folder: Path, ranks: int) -> None:
    """Every layout, with negatives inside a rank and across ranks."""
    warnings.filterwarnings("ignore")
    for layout in ("packed", "paper"):
        for across in (False, True):
            train(folder, layout, across, ranks, "ddp")
        if ranks == 2:
            train(folder, layout, True, ranks, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
