"""One of two processes that attend across ranks, or both in one. Run by a test: see test_gather."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_fot.model.attention.crossbatch import packed_rows, paper_rows
from lightning_fot.model.passes.base import LayerCall
from lightning_fot.model.passes.crossbatch import CrossbatchPass
from lightning_fot.model.passes.gather import RowGather

# What each of the rows sees, and rows of a rank. The first rank sees nothing in "single", nor the second in "reversed".
TABLES = {
    "packed": (packed_rows(4, 1, 3, False), 2),
    "paper": (paper_rows(4, 3), 2),
    "single": ([[], [0]], 1),
    "reversed": ([[1], []], 1),
}


def losses(name: str, part: slice, gather: RowGather | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean over targets of two layers' squared outputs, and its gradients at the layers' inputs: of some rows."""
    table, per_rank = TABLES[name]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 2 * per_rank, 2, 5, 8, dtype=torch.float64, generator=generator)
    leaves = [rows[part].clone().requires_grad_() for rows in drawn]
    count = torch.tensor([1 + 3 * row for row in range(2 * per_rank)][part]).sum()
    weights = torch.tensor([1.0 + 3 * row for row in range(2 * per_rank)], dtype=torch.float64)[part, None, None, None]
    query, key, value = leaves
    for _ in range(2):
        crossbatch = CrossbatchPass(table[part], gather=gather)
        value = crossbatch.attend(LayerCall(0, backend=None), query, key, value, 0.3, None)
    loss = (weights * value.square()).sum() / count
    if gather is not None:
        loss = loss * gather.weight(count)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def main(folder: Path, rank: int | None) -> None:
    """Writes what each table gives."""
    if rank is None:
        found = {name: losses(name, slice(None), None) for name in TABLES}
        torch.save(found, folder / "whole.pt")
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name, (_, per_rank) in TABLES.items():
        part = slice(rank * per_rank, (rank + 1) * per_rank)
        found[name] = losses(name, part, RowGather(rank, 2))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
