"""A small Ray cluster for the tests of a process, and memories in its shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_fot.memory import Memory, MemoryShape
from lightning_fot.memory.base import BaseLayer
from lightning_fot.memory.place import Place
from lightning_fot.memory.token_log import TokensRead

SHARDS = {"count": 3, "cpus": 0}
OTHERS = {"count": 2, "cpus": 0}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """One node of this machine, without a dashboard; ended with all its processes."""
    pytest.importorskip("ray")
    from lightning_fot.shards import engine, group

    ray = engine.library()
    if ray.is_initialized():
        # That of another folder of tests, which ends it.
        yield ray
        return
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=256 << 20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield ray
    group.close_all()
    ray.shutdown()


def place(given: Any) -> Place:
    """Where pairs lie, by the settings of ``model.memory.shards``."""
    from lightning_fot.config.memory import ShardSettings
    from lightning_fot.shards.place import Sharded

    settings = ShardSettings.read(given)
    assert settings is not None
    return Sharded(settings)


def shape(dtype: torch.dtype = torch.float32, heads: int = 2, dim: int = 8) -> MemoryShape:
    """Two memory layers; values are shorter than keys."""
    return MemoryShape((1, 3), (heads, heads), (dim, dim), (dim - 2, dim - 2), dtype, torch.device("cpu"))


def new_memory(where: Place | None, like: MemoryShape, rows: int, spec: Any = "exact", **given: Any) -> Memory:
    """Made by nobody in particular."""
    return Memory(like, rows, spec, fingerprint=lambda: {"made": 1}, place=where, **given)


def read_text(memory: Memory, counts: list[int], seed: int, name: str | None = None, size: float = 1.0) -> None:
    """Random pairs, ``counts[b]`` of each row b."""
    generator = torch.Generator().manual_seed(seed)
    like, width = memory.shape, max(counts)
    pairs = {
        layer: (
            torch.randn(len(counts), heads, width, dim, generator=generator) * size,
            torch.randn(len(counts), heads, width, value_dim, generator=generator) * size,
        )
        for layer, heads, dim, value_dim in zip(like.layers, like.kv_heads, like.head_dim, like.value_dim, strict=True)
    }
    ids = torch.randint(0, 99, (len(counts), width), generator=generator)
    valid = torch.arange(width) < torch.tensor(counts)[:, None]
    if name is not None:
        memory.log.begin([name] * len(counts))
    memory.append(pairs, torch.tensor(counts), TokensRead(ids, valid, valid))


def attended(
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: list[int],
    queries: torch.Tensor,
    k: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the ``k`` best pairs by the formula, in fp64: output and log-sum-exps."""
    scores = queries.double() @ keys.double().mT
    hidden = torch.arange(keys.shape[2]) >= torch.tensor(lengths)[:, None]
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    best = scores.topk(min(k, keys.shape[2]), dim=-1).values[..., -1:]
    scores = scores.masked_fill(scores < best, -torch.inf)
    scores = scores * scale
    if softcap is not None:
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(scores == -torch.inf, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().nan_to_num() @ values.double(), lse


def contents(layer: BaseLayer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each row."""
    keys, values = layer.keys, layer.values
    return [(keys[row, :, :length], values[row, :, :length]) for row, length in enumerate(layer.lengths)]
