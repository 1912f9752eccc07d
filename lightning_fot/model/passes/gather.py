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
    DDP averages parameter gradients over ranks: with losses weighted by :meth:`weight` the outcome is that of one
    process with the whole batch.

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

    def keep(self, output: Tensor, *gathered: Tensor) -> Tensor:
        """``output``, with gathered rows that it does not depend on in its graph, at gradients of 0.

        A rank that sees none of the rows would else skip the backward pass of gathering, for which the others wait.
        """
        kept: Tensor = _Keep.apply(output, *gathered)  # type: ignore[no-untyped-call]
        return kept

    def weight(self, targets: Tensor) -> Tensor:
        """What to multiply a mean over this rank's targets by, so that the average over ranks is that over all targets.

        Args:
            targets: How many this rank has, a scalar; every rank must call it.
        """
        total = targets.to(torch.float64)
        dist.all_reduce(total)
        return targets * self.world_size / total.clamp_min(1)


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


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *gathered: Tensor) -> Tensor:
        ctx.save_for_backward(*gathered)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(rows) for rows in ctx.saved_tensors)
