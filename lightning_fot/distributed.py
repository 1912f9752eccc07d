"""Rows of all ranks as one crossbatch: windows are gathered with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def shard(model: nn.Module, attentions: Sequence[nn.Module], mesh: Any) -> None:
    """Shards a model's parameters over the data-parallel ranks (FSDP2), a block at a time.

    Args:
        model: With its memory attached, and frozen where it is to be.
        attentions: Its attention layers; the module that holds one is a block.
        mesh: Lightning's device mesh, of ``ModelParallelStrategy``.
    """
    from torch.distributed.fsdp import fully_shard

    names = {id(part): name for name, part in model.named_modules()}
    ranks = mesh["data_parallel"]
    for attention in attentions:
        fully_shard(model.get_submodule(names[id(attention)].rpartition(".")[0]), mesh=ranks)
    fully_shard(model, mesh=ranks)


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
