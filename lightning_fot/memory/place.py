"""Where the pairs of a memory lie: in this process, or elsewhere (``lightning_fot.shards``)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_fot.config.retriever import RetrieverSpec, layer_spec
from lightning_fot.memory.base import BaseLayer
from lightning_fot.memory.data_files import (
    Named,
    Parts,
    Stretches,
    coding_tensors,
    fill,
    pair_entries,
    read_file,
    write_file,
)
from lightning_fot.memory.layer import MemoryLayer


@dataclass(frozen=True)
class MemoryShape:
    """What a memory must share with the model that reads it.

    Args:
        layers: Memory layers.
        kv_heads: G of each memory layer.
        head_dim: D of each memory layer's keys.
        value_dim: D of each memory layer's values.
        dtype: Stored dtype; ``torch.int8`` stands for a byte a coordinate and a scale a vector.
        device: Where the pairs are kept.
    """

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    value_dim: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Written:
    """Files that hold the pairs of a memory.

    Args:
        files: What the index is to say of each: file, digest, and the rows' first and last pairs in it.
        extra: What else the index is to say.
        tensors: What belongs into the file of the log.
    """

    files: list[dict[str, Any]]
    extra: dict[str, Any]
    tensors: dict[str, torch.Tensor]


Layers = dict[int, BaseLayer]


class Place(ABC):
    """Makes the layers of a memory, writes and reads their files."""

    @abstractmethod
    def layers(self, shape: MemoryShape, batch_size: int, retriever: RetrieverSpec) -> Layers:
        """Layers without pairs.

        Args:
            shape: Layers, heads, sizes and dtype.
            batch_size: B, independent rows.
            retriever: As ``MemoryConfig.retriever``.
        """

    @abstractmethod
    def write(
        self, layers: Mapping[int, BaseLayer], target: Path, known: Mapping[str, Any], lengths: Sequence[int]
    ) -> Written:
        """Writes what no file holds yet.

        Args:
            layers: Of this place.
            target: The folder.
            known: The index of the folder where its files hold the start of these layers, as far as its ``lengths``;
                empty otherwise.
            lengths: Pairs of each row.

        Raises:
            OSError: A file cannot be written.
        """

    def in_use(self, target: Path) -> set[str]:
        """Names of files of the folder that must stay, whatever its index names."""
        return set()

    @abstractmethod
    def read(
        self,
        layers: Mapping[int, BaseLayer],
        source: Path,
        index: Mapping[str, Any],
        log: Mapping[str, torch.Tensor],
        folder: str | os.PathLike[str],
    ) -> None:
        """Gives empty layers of this place the pairs of a folder.

        Args:
            layers: Of this place.
            source: The folder.
            index: Its index.
            log: The file of the log.
            folder: The folder in the user's words.

        Raises:
            SettingError: A file is missing or altered.
            KeyError, ValueError, TypeError, IndexError: They do not fit together.
        """


def shard_stretches(index: Mapping[str, Any]) -> list[Stretches]:
    """For each row of a folder that shards wrote, stretches of all its pairs in their order.

    Example:
        >>> shard_stretches({"placement": [[[0, 2], [1, 3], [0, 1]]]})
        [[(0, 0, 2), (1, 0, 3), (0, 2, 3)]]
    """
    found: list[Stretches] = []
    for runs in index["placement"]:
        ends: dict[int, int] = {}
        row = []
        for shard, count in runs:
            start = ends.get(shard, 0)
            ends[shard] = start + count
            row.append((int(shard), start, start + int(count)))
        found.append(row)
    return found


class InProcess(Place):
    """Pairs lie in this process.

    Args:
        key_folder: Keep keys in files of this folder, paged in and out by the operating system; None keeps them in
            memory.
        value_folder: The same for values.
    """

    def __init__(self, key_folder: str | None = None, value_folder: str | None = None) -> None:
        self.key_folder, self.value_folder = key_folder, value_folder

    def layers(self, shape: MemoryShape, batch_size: int, retriever: RetrieverSpec) -> Layers:
        return {
            layer: MemoryLayer.empty(
                batch_size,
                heads,
                dim,
                value_dim,
                layer_spec(retriever, layer),
                shape.dtype,
                shape.device,
                self.key_folder,
                self.value_folder,
            )
            for layer, heads, dim, value_dim in zip(
                shape.layers, shape.kv_heads, shape.head_dim, shape.value_dim, strict=True
            )
        }

    def write(
        self, layers: Mapping[int, BaseLayer], target: Path, known: Mapping[str, Any], lengths: Sequence[int]
    ) -> Written:
        own, stop = _own(layers), list(lengths)
        # What shards have written is put together otherwise.
        known = {} if "placement" in known else known
        files, done = list(known.get("pairs", [])), known.get("lengths", [0] * len(stop))
        if not files or stop != done:
            file = write_file(target, "memory", pair_entries(own, done, stop))
            files.append({**file, "start": done, "stop": stop})
        return Written(files, {}, coding_tensors(own))

    def read(
        self,
        layers: Mapping[int, BaseLayer],
        source: Path,
        index: Mapping[str, Any],
        log: Mapping[str, torch.Tensor],
        folder: str | os.PathLike[str],
    ) -> None:
        own = _own(layers)
        if "placement" in index:
            named: list[Named] = list(index["pairs"])
            Parts(source, named, folder).fill(own, shard_stretches(index))
            return
        fill(own, [(one, read_file(source, one, folder)) for one in index["pairs"]], log)


def _own(layers: Mapping[int, BaseLayer]) -> dict[int, MemoryLayer]:
    own = {number: layer for number, layer in layers.items() if isinstance(layer, MemoryLayer)}
    if len(own) < len(layers):
        raise TypeError("layers of another place")
    return own
