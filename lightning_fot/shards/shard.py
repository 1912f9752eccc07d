"""What runs in the process of one shard: its slice of the pairs, in as many versions as somebody still holds.

A version is a :class:`MemoryLayer` and never changes. What changes a layer makes another version of it, which shares
all that is stored; so each may be asked, made again after a loss, and let go in any order.
"""

from __future__ import annotations

import os
import platform
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fot.config.memory import SHARDS
from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.memory.data_files import (
    Named,
    Parts,
    Stretches,
    coding_tensors,
    pair_entries,
    tensor_entries,
    write_file,
)
from lightning_fot.memory.layer import MemoryLayer
from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.registry import create_retriever
from lightning_fot.retrievers.stats import RetrieverStats
from lightning_fot.shards.attention import Part, attend_scored, attend_shown, capped
from lightning_fot.shards.packing import Packed, pack, unpack

# Answers of a first call that wait for the second, at most.
_TICKETS = 64


@dataclass(frozen=True)
class LayerShape:
    """What a layer of a shard is made of.

    Args:
        batch_size: B, independent rows.
        kv_heads: G.
        key_dim: D of keys.
        value_dim: D of values.
        dtype: Stored dtype, by name.
        spec: Specification of the retriever of this layer.
    """

    batch_size: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    spec: RetrieverSpec

    @cached_property
    def kind(self) -> type[Retriever]:
        """Of the retriever.

        Raises:
            SettingError, MissingLibraryError: It cannot be made.
        """
        return type(create_retriever(self.spec, self.key_dim, self.batch_size * self.kv_heads))

    def empty(self) -> MemoryLayer:
        """A layer without pairs, in this process."""
        return MemoryLayer.empty(
            self.batch_size,
            self.kv_heads,
            self.key_dim,
            self.value_dim,
            self.spec,
            getattr(torch, self.dtype),
            torch.device("cpu"),
        )


@dataclass(frozen=True)
class Change:
    """How a version comes about.

    Args:
        version: Its number, which no other has.
        parent: What it is made of; None makes it anew.
        name: ``empty`` or ``load``, or a method of :class:`MemoryLayer`.
        args: Of that; tensors packed.
    """

    version: int
    parent: int | None
    name: str
    args: tuple[Any, ...]


class GoneError(Exception):
    """What a second call asks for is not known here: the process was started anew between the two."""


class MissingError(Exception):
    """A version, its only argument, is not there: what it was made of could not be found again."""


def versions_here() -> dict[str, str]:
    """What must be the same in all processes."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "lightning-fot": metadata.version("lightning-fot"),
    }


class Shard:
    """The slice of one process.

    Args:
        number: Of the shard, from 0.
        limit: Bytes that its pairs may take; None sets no limit.
        threads: That it computes with.
    """

    def __init__(self, number: int, limit: int | None = None, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._number = number
        self._limit = limit
        self._versions: dict[int, MemoryLayer] = {}
        self._past: dict[int, RetrieverStats] = {}
        self._tickets: OrderedDict[int, tuple[MemoryLayer, Tensor, Tensor]] = OrderedDict()

    def ready(self) -> dict[str, str]:
        """Says which versions run here, once it runs."""
        return versions_here()

    def process(self) -> int:
        """Its number on its machine."""
        return os.getpid()

    def change(self, changes: Sequence[Change], gone: Sequence[int] = ()) -> list[bool]:
        """Makes versions, one after the other, and lets others go.

        Returns:
            Of each new version whether what its parent held was coded anew.
        """
        self.let_go(gone)
        return [self._made(change) for change in changes]

    def _made(self, change: Change) -> bool:
        args: list[Any] = [unpack(arg) if isinstance(arg, Packed) else arg for arg in change.args]
        if change.parent is None:
            self._versions[change.version] = getattr(self, f"_{change.name}")(*args)
            return False
        parent = self._version(change.parent)
        self._past[change.version] = _sum(self._past.get(change.parent), parent.retriever.stats())
        if change.name == "select_rows":
            self._versions[change.version] = parent.select_rows(*args)
            return False
        layer = parent.snapshot()
        getattr(layer, change.name)(*args)
        if change.name == "append":
            self._refuse_too_much(layer)
        self._versions[change.version] = layer
        return any(old is not None and old is not new for old, new in zip(parent.codings, layer.codings, strict=True))

    def _version(self, number: int) -> MemoryLayer:
        if number not in self._versions:
            raise MissingError(number)
        return self._versions[number]

    def _empty(self, shape: LayerShape) -> MemoryLayer:
        return shape.empty()

    def _load(
        self, shape: LayerShape, number: int, folder: str, files: Sequence[Named], rows: Sequence[Stretches]
    ) -> MemoryLayer:
        layer = shape.empty()
        if any(rows):
            Parts(Path(folder), files, folder).fill({number: layer}, rows)
        self._refuse_too_much(layer)
        return layer

    def _refuse_too_much(self, new: MemoryLayer) -> None:
        if self._limit is None:
            return
        held: dict[int, int] = {}
        for layer in (*self._versions.values(), new):
            for store in (layer.key_store, layer.value_store):
                held.update(store.segment_bytes)
        total = sum(held.values())
        if total > self._limit:
            raise SettingError(
                f"{SHARDS}.memory_mib", self._limit >> 20,
                f"is full: pairs of shard {self._number} take {total / 2**20:.0f} MiB",
                "Raise it, take more shards, or set model.memory.capacity or model.memory.dtype=int8.",
            )  # fmt: skip

    def let_go(self, versions: Sequence[int]) -> None:
        """Forgets versions."""
        for version in versions:
            self._versions.pop(version, None)
            self._past.pop(version, None)

    def nearest(
        self, version: int, queries: Packed, k: int, ticket: int | None, rows: bool
    ) -> tuple[Packed, Packed | None]:
        """The first call of a search: scores of this shard's best.

        Args:
            version: What is asked.
            queries: (B, G, Q, D) fp32.
            k: Pairs wanted.
            ticket: What :meth:`attend` will call the answer; None calls for no second call.
            rows: Whether numbers are wanted.

        Returns:
            Inner products (B, G, Q, k) fp32, the largest first, -inf where there are fewer; and numbers here, -1 there.
        """
        layer, asked = self._version(version), unpack(queries)
        scores, found = self._best(layer, asked, k)
        if ticket is not None:
            self._tickets[ticket] = (layer, scores, found)
        while len(self._tickets) > _TICKETS:
            self._tickets.popitem(last=False)
        return pack(scores), pack(found) if rows else None

    def _best(self, layer: MemoryLayer, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = layer.search(queries, min(k, max(layer.lengths)))
        scores = torch.matmul(layer.keys_at(found).float(), queries[..., None])[..., 0]
        scores, order = scores.masked_fill(found < 0, -torch.inf).sort(dim=-1, descending=True)
        return scores, found.gather(-1, order)

    def attend(self, ticket: int, counts: Packed, scale: float, softcap: float | None) -> tuple[Packed, Packed]:
        """The second call: attention to the first ``counts`` (B, G, Q) of those whose scores were given.

        Returns:
            Output (B, G, Q, D) and log-sum-exps (B, G, Q), fp32.

        Raises:
            GoneError: The ticket is not known.
        """
        if ticket not in self._tickets:
            raise GoneError
        layer, scores, found = self._tickets.pop(ticket)
        won = unpack(counts).long()
        most = int(won.max())
        scores, found = scores[..., :most], found[..., :most]
        scores = capped(scores, scale, softcap).masked_fill(torch.arange(most) >= won[..., None], -torch.inf)
        return _packed(attend_scored(scores, layer.values_at(found)))

    def nearest_values(self, version: int, queries: Packed, k: int, rows: bool) -> tuple[Packed, Packed, Packed | None]:
        """As :meth:`nearest`, with the values (B, G, Q, k, D) of the pairs in place of a second call."""
        layer, asked = self._version(version), unpack(queries)
        scores, found = self._best(layer, asked, k)
        return pack(scores), pack(layer.values_at(found)), pack(found) if rows else None

    def attend_all(self, version: int, queries: Packed, scale: float, softcap: float | None) -> tuple[Packed, Packed]:
        """Attention to all pairs of each row: as :meth:`attend`."""
        layer = self._version(version)
        shown = attend_shown(unpack(queries), layer.keys, layer.values, layer.lengths, scale, softcap)
        return _packed(shown)

    def gather(self, version: int, rows: Packed) -> tuple[Packed, Packed]:
        """Keys and values (B, G, Q, K, D) of numbers (B, G, Q, K); any for -1."""
        found = self._version(version).gather(unpack(rows))
        return pack(found.keys), pack(found.values)

    def stretch(self, version: int, row: int, start: int, stop: int, keys_only: bool = False) -> tuple[Packed, ...]:
        """Keys and values (G, n, D) of pairs ``start`` to ``stop`` of a row."""
        layer = self._version(version)
        first, banks = layer.dropped[row], range(row * layer.kv_heads, (row + 1) * layer.kv_heads)
        stores = (layer.key_store,) if keys_only else (layer.key_store, layer.value_store)
        return tuple(
            pack(torch.stack([store.rows(bank, first + start, first + stop) for bank in banks])) for store in stores
        )

    def observe(self, version: int, queries: Packed) -> None:
        """Shows the retriever queries (B, G, Q, D)."""
        self._version(version).observe(unpack(queries))

    def flush(self, version: int) -> None:
        """Builds whatever is pending."""
        self._version(version).retriever.flush()

    def told(self, version: int) -> dict[str, Any]:
        """What measurements want to know of a version."""
        layer = self._version(version)
        return {
            "nbytes": layer.nbytes,
            "index_bytes": layer.retriever.nbytes,
            "indexed": layer.retriever.indexed.tolist(),
            "stored": layer.key_store.lengths_list,
            "stats": _sum(self._past.get(version), layer.retriever.stats()),
        }

    def write(
        self, versions: Mapping[int, int], folder: str, start: Sequence[int], stop: Sequence[int]
    ) -> dict[str, Any]:
        """Writes pairs ``start[b]`` to ``stop[b]`` of each row b into one file.

        Args:
            versions: By number of the layer.
            folder: Seen from here.
            start: Of each row.
            stop: Of each row.

        Raises:
            OSError: The file cannot be written.
        """
        layers = {number: self._version(version) for number, version in versions.items()}
        entries = [*pair_entries(layers, start, stop), *tensor_entries(coding_tensors(layers))]
        named = write_file(Path(folder), "memory", entries)
        return {**named, "shard": self._number, "start": list(start), "stop": list(stop)}


def _packed(part: Part) -> tuple[Packed, Packed]:
    return pack(part[0]), pack(part[1])


def _sum(some: RetrieverStats | None, other: RetrieverStats) -> RetrieverStats:
    if some is None:
        return other
    counted = {name: value + getattr(other, name) for name, value in vars(some).items()}
    return RetrieverStats(**{**counted, "build_times": counted["build_times"][-256:]})
