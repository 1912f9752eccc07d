"""What the retrieval callbacks cost: a measurement beside a training step, and their share of a real ``fit``.

    python benchmarks/callbacks.py                     # sizes of configs/hnsw.yaml: SmolLM2-135M, windows of 256
    python benchmarks/callbacks.py --config smoke      # a model so small that measuring is dear beside a step
    python benchmarks/callbacks.py --seconds 600       # train as long, and print the share that measuring took

Text is the source of Python's standard library. Steps are whole: loading, forward, backward, optimiser.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import statistics
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig
from lightning_fot.callbacks import RetrievalRecall, RetrievalSpeed
from lightning_fot.pretrained import load_tokenizer
from lightning_fot.request.request import find_config

FILES = ("argparse.py", "ast.py", "doctest.py", "tarfile.py", "typing.py", "zipfile.py")


class Packs(IterableDataset[dict[str, Tensor]]):
    """Batches whose rows are consecutive windows of one text, without end."""

    def __init__(self, backbone: str, rows: int, window: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).is_file())
        ids = load_tokenizer(backbone)(text, return_tensors="pt")["input_ids"][0]
        size = rows * window
        self.batches = ids[: len(ids) // size * size].view(-1, rows, window)

    def __iter__(self) -> Any:
        while True:
            for batch in self.batches:
                yield {"input_ids": batch, "targets": batch.flatten().roll(-1).view_as(batch)}


class Clock(L.Callback):
    """Seconds of each training step, callbacks' hooks left out, and an end after some time."""

    def __init__(self, seconds: float) -> None:
        self.limit = seconds
        self.steps: list[float] = []
        self.began = self.step_began = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # First in the Trainer's list: the probes' hooks come after it.
        self.steps.append(time.perf_counter() - self.step_began)
        trainer.should_stop = time.perf_counter() - self.began > self.limit


def fit(settings: Any, seconds: float, steps: int, probes: list[L.Callback]) -> Clock:
    """Trains for some steps or seconds with the sizes of a configuration."""
    torch.manual_seed(0)
    memory = MemoryConfig(**OmegaConf.to_container(settings.model.memory))
    crossbatch = CrossbatchConfig(**OmegaConf.to_container(settings.model.crossbatch))
    model = FocusedTransformer(settings.model.backbone, memory, crossbatch)
    clock = Clock(seconds)
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[clock, *probes], logger=False, enable_checkpointing=False, max_steps=steps,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    model.configure_model()
    model.train()
    packs = Packs(settings.model.backbone, settings.data.batch_size, memory.window)
    trainer.fit(model, DataLoader(packs, batch_size=None))
    return clock


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="hnsw")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=0.0, help="also train as long with the default budget")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    settings = OmegaConf.load(find_config(arguments.config)[0])
    window = settings.model.memory.window
    batch = settings.data.batch_size * window
    # The training text holds what is measured after so many steps.
    stream = settings.model.crossbatch.pack * window
    full = -(-(arguments.tokens // window + 1) * window // stream)
    probe = RetrievalRecall(arguments.tokens, every_n_steps=full, max_share=None)
    clock = fit(settings, 1e9, full, [probe, RetrievalSpeed(arguments.tokens)])
    step = statistics.median(clock.steps[1:])
    print(f"{arguments.config}: {torch.get_num_threads()} threads, batches of {batch} tokens, {full} steps")
    print(f"a step                                 {step:8.3f} s")
    print(f"a measurement of {arguments.tokens} tokens, both probes {probe.budget.spent:8.3f} s")
    for row in probe.rows:
        print(f"  layer {row['layer']}: build {row['build_s']:.3f} s, add {row['add_s']:.3f} s, "
              f"search {row['search_ms_p50']:.2f} ms, recall {row['recall']:.3f}, indexed {row['indexed_share']:.2f}, "
              f"rows scanned {row['rows_scanned']:.0f}, skewness {row['hub_skewness']:.1f}")  # fmt: skip
        for place, quality in row["positions"].items():
            print(f"    position {place}: recall {quality['recall']:.3f}, mass {quality['mass']:.3f}")
    print(f"2 % of the steps pay for one every     {probe.budget.spent / (0.02 * step):8.0f} steps")
    if arguments.seconds:
        probe = RetrievalRecall(arguments.tokens, every_n_steps=1)
        clock = fit(settings, arguments.seconds, -1, [probe, RetrievalSpeed(arguments.tokens)])
        total = time.perf_counter() - clock.began
        share = probe.budget.spent / (total - probe.budget.spent)
        print(f"a fit of {total:.0f} s, {len(clock.steps)} steps: measuring took {probe.budget.spent:.2f} s, "
              f"{100 * share:.2f} % of the rest")  # fmt: skip


if __name__ == "__main__":
    main()
