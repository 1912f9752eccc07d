"""Rows of all ranks as one crossbatch: windows are gathered with their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_fot.errors import SettingError
from lightning_fot.training.parameters import block_names


def shard(model: nn.Module, attentions: Iterable[nn.Module], mesh: Any) -> None:
    """Shards a model's parameters over the data-parallel ranks (FSDP2), a block at a time.

    Args:
        model: With its memory attached, and frozen where it is to be.
        attentions: Its attention layers; the module that holds one is a block.
        mesh: Lightning's device mesh, of ``ModelParallelStrategy``.

    Raises:
        SettingError: The mesh also splits layers, which is not offered. It is what Lightning's ``auto`` does.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise SettingError(
            "trainer.strategy.init_args.tensor_parallel_size",
            mesh["tensor_parallel"].size(),
            "would leave layers to be split, which no memory layer can be",
            f"Set it to 1, and data_parallel_size to {mesh.size()}.",
        )
    ranks = mesh["data_parallel"]
    for name in block_names(model, attentions):
        fully_shard(model.get_submodule(name), mesh=ranks)
    fully_shard(model, mesh=ranks)
