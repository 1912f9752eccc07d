"""Trains on as many processes as it is told, and writes the weights. Run by a test: see test_training."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, CrossbatchDataModule, FocusedTransformer, MemoryConfig
from lightning_fot.config.schedule import ScheduleConfig
from lightning_fot.errors import SettingError

STEPS, ROWS = 3, 4
# Two contexts, six, two: the same draw on all ranks.
DRAWN = {"schedule": ScheduleConfig("draw", [2, 6], seed=5)}
# Steps of a journey of checkpoints between one process and two.
JOURNEY = 4


def rows(layout: str, per_rank: int) -> dict[str, torch.Tensor]:
    """All rows of all steps and ranks, (STEPS, 2 * per_rank, ...)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (STEPS, 2 * per_rank, 17), generator=generator)
    batch = {"input_ids": ids[..., :-1], "targets": ids[..., 1:].clone()}
    # The second rank has far fewer targets, and an odd number of them.
    batch["targets"][:, per_rank:, :-3] = -100
    if layout == "paper":
        batch["previous_ids"] = torch.randint(3, 259, (STEPS, 2 * per_rank, 1, 16), generator=generator)
        batch["previous_valid"] = torch.ones(STEPS, 2 * per_rank, 1, dtype=torch.bool)
        batch["previous_valid"][:, 5] = False
    return batch


class Batches(torch.utils.data.Dataset):
    """Batches of this rank; of one process: whole ones, or what the ranks would have had, one after the other."""

    def __init__(self, layout: str, whole: bool, per_rank: int) -> None:
        self.rows = rows(layout, per_rank)
        self.whole = whole
        self.per_rank = per_rank

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
        return {name: part[step, rank * self.per_rank : (rank + 1) * self.per_rank] for name, part in self.rows.items()}


def module(crossbatch: CrossbatchConfig, **settings: Any) -> FocusedTransformer:
    """A tiny model whose lower blocks are frozen."""
    return FocusedTransformer(
        "tiny-random-llama",
        MemoryConfig(memory_layers=[1, 3], window=16, top_k=8),
        crossbatch,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5),
        trainable="from_first_memory_layer",
        **settings,
    )


def trainer(folder: Path, ranks: int, strategy: str | Strategy, **settings: Any) -> L.Trainer:
    """One that trains on CPU and writes nothing."""
    settings = {"use_distributed_sampler": False, **settings}
    return L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy if ranks > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def train(folder: Path, name: str, ranks: int, strategy: str | Strategy, per_rank: int, **settings: Any) -> None:
    """Three steps; rank 0 writes the weights and the metrics of validation."""
    L.seed_everything(1, verbose=False)
    crossbatch = CrossbatchConfig(**settings)
    across = crossbatch.across_ranks
    accumulate = 1 if across or ranks > 1 else 2
    run = trainer(folder, ranks, strategy, max_steps=STEPS, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    loader = DataLoader(Batches(crossbatch.layout, across, per_rank), batch_size=None)
    # Checkpointed layers gather again in the backward pass.
    model = module(crossbatch, gradient_checkpointing=name == "single")
    run.fit(model, loader, loader)
    weights = {
        name: part.full_tensor() if isinstance(part, DTensor) else part.detach().clone()
        for name, part in model.named_parameters()
        if part.requires_grad
    }
    if run.is_global_zero:
        torch.save(weights, folder / f"{name}-{ranks}.pt")
        metrics = {key: float(value) for key, value in run.callback_metrics.items()}
        (folder / f"{name}-{ranks}.json").write_text(json.dumps(metrics))


def journey(folder: Path, ranks: int, name: str, start: str | None, steps: int) -> None:
    """Reads a text in 8 rows until so many steps are done, from a checkpoint or from the beginning."""
    L.seed_everything(1, verbose=False)
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for number in range(4):
            (texts / f"{number}.txt").write_text(" ".join(str(value * number) for value in range(900)))
    data = CrossbatchDataModule(
        [str(texts)],
        "tiny-random-llama",
        window=16,
        batch_size=8 // ranks,
        pack=4,
        cache_dir=str(folder / "cache"),
    )
    # Lightning would put a shuffling sampler into the loader, if it could.
    run = trainer(folder, ranks, "ddp", max_steps=steps, limit_val_batches=0, use_distributed_sampler=True)
    crossbatch = CrossbatchConfig(pack=4, range=3, stepping=False, across_ranks=True)
    run.fit(module(crossbatch), datamodule=data, ckpt_path=start and folder / start, weights_only=True)
    run.save_checkpoint(folder / name)


def plateau(folder: Path) -> None:
    """A learning rate that falls when the training loss does not, with a loss of its own on each rank."""
    L.seed_everything(1, verbose=False)
    run = trainer(folder, 2, "ddp", max_steps=STEPS, limit_val_batches=0)
    model = module(
        CrossbatchConfig(pack=4, range=3),
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="train/loss", patience=0, factor=0.5),
    )
    run.fit(model, DataLoader(Batches("packed", False, ROWS), batch_size=None))
    found = {"rate": run.optimizers[0].param_groups[0]["lr"], "loss": float(run.callback_metrics["train/loss"])}
    (folder / f"plateau-{run.global_rank}.txt").write_text(json.dumps(found))


class Broken(Batches):
    """Of the second rank only, the last batch has an embedding that is not a number."""

    model: FocusedTransformer

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == STEPS - 1 and torch.distributed.get_rank() == 1:
            with torch.no_grad():
                self.model.lm.model.get_input_embeddings().weight.fill_(torch.nan)
        return super().__getitem__(index)


def refused(folder: Path, ranks: int) -> None:
    """What each rank says of a loss that is not finite on one of them, and of layers that would be split."""
    split = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    for name, strategy in (("finite", "ddp"), ("split", split)):
        run = trainer(folder, ranks, strategy, max_steps=STEPS, limit_val_batches=0)
        model = module(CrossbatchConfig(pack=4, range=3))
        batches = Broken("packed", False, ROWS)
        batches.model = model
        try:
            run.fit(model, DataLoader(batches, batch_size=None))
        except SettingError as error:
            (folder / f"{name}-{run.global_rank}.txt").write_text(str(error))


def main(folder: Path, ranks: int, part: str) -> None:
    """Every layout, with negatives inside a rank and across ranks; or the last leg of a journey."""
    warnings.filterwarnings("ignore")
    if part == "return":
        return journey(folder, 1, "two-one.ckpt", "two.ckpt", JOURNEY)
    if part == "refused":
        return refused(folder, ranks)
    packed = {"layout": "packed", "pack": 4, "range": 3, "stepping": False}
    for layout in (packed, {"layout": "paper", "d": 3}):
        name = layout["layout"]
        train(folder, f"{name}-inside", ranks, "ddp", ROWS, **layout)
        layout = {**layout, "across_ranks": True} | (DRAWN if name == "paper" else {})
        train(folder, f"{name}-across", ranks, "ddp", ROWS, **layout)
        if ranks == 2:
            sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            train(folder, f"{name}-sharded", ranks, sharded, ROWS, **layout)
    # The first rank's only row sees nothing, while the second rank's sees it.
    train(folder, "single", ranks, "ddp", 1, layout="packed", pack=1, range=1, across_ranks=True)
    if ranks == 1:
        journey(folder, 1, "whole.ckpt", None, JOURNEY)
        journey(folder, 1, "one.ckpt", None, JOURNEY // 2)
    else:
        journey(folder, 2, "two.ckpt", None, JOURNEY // 2)
        journey(folder, 2, "one-two.ckpt", "one.ckpt", JOURNEY)
        plateau(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
