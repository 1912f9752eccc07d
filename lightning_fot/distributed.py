"""Rows of all ranks as one crossbatch: windows are gathered with their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RowGather:
    """Gathers rows (B, ...) of every rank as (W·B, ...), rank by rank.

    The gradient of a gathered row is the sum of what all ranks' losses say of it, brought back to the rank that has it.
    DDP averages parameter gradients over ranks, so with as many targets on each the outcome is that of one process
    with the whole batch.

    Args:
        rank: Of this process.
        world_size: W.
    """

    rank: int
    world_size: int

    def __call__(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) of all ranks; every rank must call it, in the same order."""
        gathered: Tensor = _Gather.apply(rows, self.rank, self.world_size)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.mine = slice(rank * len(rows), (rank + 1) * len(rows))
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.mine], None, None
