"""A memory shared out over shards: its layers, and its files, one of each shard in one folder under one index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_fot.config.memory import ShardSettings
from lightning_fot.config.retriever import RetrieverSpec, layer_spec
from lightning_fot.errors import SettingError
from lightning_fot.memory.base import BaseLayer
from lightning_fot.memory.data_files import Named, Stretches
from lightning_fot.memory.place import Layers, MemoryShape, Place, Written, shard_stretches
from lightning_fot.shards.group import Group, group_of
from lightning_fot.shards.layer import ShardedLayer, shards_of
from lightning_fot.shards.placement import Row
from lightning_fot.shards.shard import Change, LayerShape


class Sharded(Place):
    """Pairs lie in shards.

    Args:
        settings: How many, where, and what each reserves.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingError: The shards cannot be made.
    """

    def __init__(self, settings: ShardSettings) -> None:
        self.settings = settings
        self.group: Group = group_of(settings)

    def layers(self, shape: MemoryShape, batch_size: int, retriever: RetrieverSpec) -> Layers:
        dtype = str(shape.dtype).removeprefix("torch.")
        made: Layers = {}
        for number, heads, key_dim, value_dim in zip(
            shape.layers, shape.kv_heads, shape.head_dim, shape.value_dim, strict=True
        ):
            spec = layer_spec(retriever, number)
            one = LayerShape(batch_size, heads, key_dim, value_dim, dtype, spec)
            made[number] = ShardedLayer(self.group, one, shape.device)
        return made

    def write(
        self, layers: Mapping[int, BaseLayer], target: Path, known: Mapping[str, Any], lengths: Sequence[int]
    ) -> Written:
        own = shards_of(layers)
        if not own:
            return Written([], {"placement": [[] for _ in lengths]}, {})
        # All layers were given the same pairs, and so have them in the same places.
        rows = next(iter(own.values())).held.rows
        # What other shards have written is written anew.
        known = known if known.get("shards") == self.group.count else {}
        files = [dict(one) for one in known.get("pairs", [])]
        calls = []
        for shard in range(self.group.count):
            stop = [row.held(shard) for row in rows]
            done = next((one["stop"] for one in reversed(files) if one["shard"] == shard), [0] * len(stop))
            if stop != done:
                versions = {number: layer.held.versions[shard].number for number, layer in own.items()}
                calls.append(self.group.ask(shard, "write", versions, str(target.resolve()), done, stop))
        files += self.group.answers(calls)
        for named in files:
            if not (target / named["file"]).is_file():
                raise SettingError(
                    "folder", str(target), f"shard {named['shard']} writes into a folder that is not seen from here",
                    "Give a folder that all machines of the cluster share.",
                )  # fmt: skip
        extra = {"placement": [[list(run) for run in row.runs] for row in rows], "shards": self.group.count}
        for number, layer in own.items():
            for shard, version in enumerate(layer.held.versions):
                mine = [one for one in files if one["shard"] == shard]
                whole = _all_of(shard, rows)
                # From now on it can be made of the files, and what was kept here for that may go.
                args = (layer.shape, number, str(target.resolve()), mine, whole)
                version.origin.rest_on(Change(version.number, None, "load", args))
        return Written(files, extra, {})

    def in_use(self, target: Path) -> set[str]:
        return self.group.files_in_use(str(target.resolve()))

    def read(
        self,
        layers: Mapping[int, BaseLayer],
        source: Path,
        index: Mapping[str, Any],
        log: Mapping[str, torch.Tensor],
        folder: str | os.PathLike[str],
    ) -> None:
        own, count = shards_of(layers), self.group.count
        files, stretches = _as_written_by_shards(index, log)
        if index.get("shards") == count:
            placed = tuple(Row(tuple((shard, size) for shard, size in runs)) for runs in index["placement"])
            parts = [_all_of(shard, placed) for shard in range(count)]
        else:
            parts, placed = _shared_out(stretches, count)
        waiting = []
        for number, layer in own.items():
            versions = []
            for shard in range(count):
                named = {one for row in parts[shard] for one, _, _ in row}
                mine = [one for one in files if one["shard"] in named]
                args = (layer.shape, number, str(source.resolve()), mine, parts[shard])
                version, done = self.group.make(shard, None, "load", *args)
                versions.append(version)
                waiting.append(done)
            layer.held = replace(layer.held, versions=tuple(versions), rows=placed)
        for done in waiting:
            done.result()


def _all_of(shard: int, rows: Iterable[Row]) -> list[Stretches]:
    """For each row one stretch of all that a shard holds of it."""
    return [[(shard, 0, row.held(shard))] if row.held(shard) else [] for row in rows]


def _as_written_by_shards(
    index: Mapping[str, Any], log: Mapping[str, torch.Tensor]
) -> tuple[list[Named], list[Stretches]]:
    """Files, and stretches of each row; a folder of one process is that of one shard."""
    if "placement" in index:
        return list(index["pairs"]), shard_stretches(index)
    whole: list[Stretches] = [[(0, 0, length)] if length else [] for length in index["lengths"]]
    coding = {"coding": index["log"]} if any(name.endswith(".centre") for name in log) else {}
    return [{**one, "shard": 0, **coding} for one in index["pairs"]], whole


def _shared_out(rows: Sequence[Stretches], count: int) -> tuple[list[list[Stretches]], tuple[Row, ...]]:
    """Each row cut into as many parts of one length: for each shard the stretches of each row, and who has what.

    Example:
        >>> _shared_out([[(0, 0, 3), (1, 0, 3)]], 2)
        ([[[(0, 0, 3)]], [[(1, 0, 3)]]], (Row(runs=((0, 3), (1, 3))),))
    """
    parts: list[list[Stretches]] = [[] for _ in range(count)]
    placed = []
    for stretches in rows:
        length = sum(stop - start for _, start, stop in stretches)
        bounds = [length * shard // count for shard in range(count + 1)]
        row = Row()
        for shard in range(count):
            low, high = bounds[shard], bounds[shard + 1]
            found, at = [], 0
            for owner, start, stop in stretches:
                first, last = max(low, at), min(high, at + stop - start)
                if first < last:
                    found.append((owner, start + first - at, start + last - at))
                at += stop - start
            parts[shard].append(found)
            row = row.plus(shard, high - low)
        placed.append(row)
    return parts, tuple(placed)
