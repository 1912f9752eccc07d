"""Trains and validates on two processes; the first writes what was logged. Run by a test: see test_two_ranks."""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lightning_fot.callbacks import RetrievalRecall, RetrievalSpeed, RunReport
from tests.support.callback_runs import Rows, module, trainer


class RankRows(Rows):
    """Text that depends on the rank."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.first = 100 * (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
        return super().__getitem__(index)


def main(folder: Path) -> None:
    """Fits with validations and with measurements in training."""
    warnings.filterwarnings("ignore")
    recall = RetrievalRecall(tokens=32, queries=8, every_n_steps=1, max_share=None)
    report = RunReport(folder / "report")
    callbacks = [recall, RetrievalSpeed(tokens=32, repeats=1), report]
    run = trainer(folder, callbacks, strategy="ddp", devices=2, max_steps=4)
    run.fit(module(trainable="all"), DataLoader(RankRows(4), batch_size=None), DataLoader(RankRows(4), batch_size=None))
    kept = [{"recall": row["recall"], "mass": row["mass"], "layer": row["layer"]} for row in recall.rows]
    assert (report.written is None) == (run.global_rank > 0)
    (folder / f"rows{run.global_rank}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
