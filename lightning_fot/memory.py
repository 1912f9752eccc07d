"""The memory: stored (key, value) pairs of every memory layer, and a retriever over the keys of each.

A memory is a value: :meth:`Memory.snapshot` costs nothing and neither copy sees what is added to the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.attention import Retrieved, Shown
from lightning_fot.errors import SettingError
from lightning_fot.retrievers.registry import create_retriever
from lightning_fot.retrievers.store import KeyStore

if TYPE_CHECKING:
    from lightning_fot.retrievers.base import Retriever

# A full memory drops this share of its capacity at once, so that the index is not rebuilt for every window.
EVICTED_SHARE = 8


@dataclass(frozen=True)
class MemoryShape:
    """What a memory must share with the model that reads it.

    Args:
        layers: Memory layers.
        kv_heads: G of each memory layer.
        head_dim: D of each memory layer's keys.
        value_dim: D of each memory layer's values.
        dtype: Stored dtype.
        device: Where the pairs are kept.
    """

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    value_dim: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class MemoryLayer:
    """Pairs of one layer: banks (row, KV head) of keys and values, and the retriever over the keys.

    Args:
        batch_size: B, independent rows.
        kv_heads: G.
        head_dim: D of keys.
        value_dim: D of values.
        retriever: Specification as ``MemoryConfig.retriever``.
        dtype: Stored dtype.
        device: Where the pairs are kept.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        retriever: Any,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        banks = batch_size * kv_heads
        self.batch_size = batch_size
        self.kv_heads = kv_heads
        self.key_store = KeyStore(head_dim, banks, dtype=dtype, device=device)
        self.value_store = KeyStore(value_dim, banks, dtype=dtype, device=device)
        self.retriever: Retriever = create_retriever(retriever, head_dim, banks)
        self.retriever.use_store(self.key_store)

    @property
    def keys(self) -> Tensor:
        """(B, G, M, D), a view; rows shorter than M end in unused places."""
        return self._rows(self.key_store)

    @property
    def values(self) -> Tensor:
        """(B, G, M, D), a view, as :attr:`keys`."""
        return self._rows(self.value_store)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and index."""
        return self.key_store.nbytes + self.value_store.nbytes + self.retriever.nbytes

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
        """Stores pairs behind those already there.

        Args:
            keys: (B, G, n, D), as if at position 0.
            values: (B, G, n, D).
            lengths: (B,) pairs that count in each row; None means n.
        """
        per_bank = None if lengths is None else lengths.repeat_interleave(self.kv_heads)
        folded = keys.flatten(0, 1)
        self.key_store.append(folded, per_bank)
        self.value_store.append(values.flatten(0, 1), per_bank)
        self.retriever.add(folded, per_bank)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Row numbers of the k largest inner products.

        Args:
            queries: (B, G, Q, D), rotated as the layer uses them.
            k: Pairs wanted.

        Returns:
            (B, G, Q, k) int64, -1 where a row holds fewer.
        """
        rows = self.retriever.search(queries.flatten(0, 1), k)
        return self._split(rows)

    def gather(self, rows: Tensor) -> Retrieved:
        """The pairs of row numbers (B, G, Q, K)."""
        folded = rows.flatten(0, 1)
        valid = folded >= 0
        index = folded.clamp_min(0).flatten(1)

        def take(store: KeyStore) -> Tensor:
            view = store.view()
            bank = torch.arange(view.shape[0], device=view.device)[:, None]
            return view[bank, index.to(view.device)].reshape(*rows.shape, view.shape[-1])

        return Retrieved(take(self.key_store), take(self.value_store), self._split(valid))

    def read(self, queries: Tensor, k: int) -> Retrieved | Shown | None:
        """What the queries (B, G, Q, D) attend to: the k nearest pairs, all when there are no more, None when empty."""
        stored = self.key_store.view().shape[1]
        if stored == 0:
            return None
        if stored <= k:
            places = torch.arange(stored, device=self.keys.device)
            row_lengths = self.key_store.lengths[:: self.kv_heads].to(places.device)
            return Shown(self.keys, self.values, places < row_lengths[:, None])
        return self.gather(self.search(queries, k))

    def keep_last(self, counts: Tensor) -> None:
        """Keeps the last ``counts`` (B,) pairs of each row; row numbers start from 0 again."""
        per_bank = counts.repeat_interleave(self.kv_heads)
        width = int(per_bank.max())
        start = self.key_store.lengths - per_bank
        places = (start[:, None] + torch.arange(width)).to(self.keys.device)
        bank = torch.arange(len(per_bank), device=places.device)[:, None]
        keys, values = (
            self._split(view[bank, places.clamp_max(view.shape[1] - 1)])
            for view in (self.key_store.view(), self.value_store.view())
        )
        self.reset()
        self.append(keys, values, counts)

    def select_rows(self, rows: Tensor, retriever: Any) -> MemoryLayer:
        """A new layer whose row i holds what row ``rows[i]`` holds here."""
        keys, values = self.keys, self.values
        other = MemoryLayer(
            len(rows), self.kv_heads, keys.shape[3], values.shape[3], retriever, keys.dtype, keys.device
        )
        lengths = self.key_store.lengths[:: self.kv_heads].cpu()[rows.cpu()]
        if keys.shape[2]:
            other.append(keys[rows.to(keys.device)], values[rows.to(keys.device)], lengths)
        return other

    def reset(self) -> None:
        """Forgets all pairs."""
        self.key_store.reset()
        self.value_store.reset()
        self.retriever.reset()

    def snapshot(self) -> MemoryLayer:
        """An independent layer that shares what is stored so far: O(1)."""
        other = object.__new__(MemoryLayer)
        other.batch_size, other.kv_heads = self.batch_size, self.kv_heads
        other.key_store, other.value_store = self.key_store.fork(), self.value_store.fork()
        other.retriever = self.retriever.fork(other.key_store)
        return other

    def _rows(self, store: KeyStore) -> Tensor:
        return self._split(store.view())

    def _split(self, folded: Tensor) -> Tensor:
        """(B·G, ...) → (B, G, ...)."""
        return folded.reshape(self.batch_size, self.kv_heads, *folded.shape[1:])


class Memory:
    """The external memory of an attached model: pairs of every memory layer, row by row.

    Args:
        shape: Layers, heads, sizes and dtype of the model it belongs to.
        batch_size: B, independent rows.
        retriever: Specification as ``MemoryConfig.retriever``; one retriever is made for each layer.
        capacity: Tokens kept a row, oldest out (an eighth of the capacity at a time); None keeps all.
        fingerprint: Names the model when the memory is saved, JSON-able; called then, since it reads weights.

    Raises:
        SettingError: ``batch_size`` is below 1, or the retriever cannot be made.
    """

    def __init__(
        self,
        shape: MemoryShape,
        batch_size: int,
        retriever: Any,
        capacity: int | None = None,
        fingerprint: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        if batch_size < 1:
            raise SettingError("batch_size", batch_size, "a memory has at least one row", "Give the number of rows.")
        self.shape = shape
        self.batch_size = batch_size
        self.retriever = retriever
        self.capacity = capacity
        self.fingerprint = fingerprint
        self.tokens_seen = torch.zeros(batch_size, dtype=torch.int64)
        self.layers: dict[int, MemoryLayer] = {
            layer: MemoryLayer(batch_size, heads, dim, value_dim, retriever, shape.dtype, shape.device)
            for layer, heads, dim, value_dim in zip(
                shape.layers, shape.kv_heads, shape.head_dim, shape.value_dim, strict=True
            )
        }

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens stored in each row."""
        layer = next(iter(self.layers.values()), None)
        if layer is None:
            return torch.zeros(self.batch_size, dtype=torch.int64)
        return layer.key_store.lengths[:: layer.kv_heads].cpu().clone()

    def __len__(self) -> int:
        """Tokens stored in the longest row."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and indexes of all layers."""
        return sum(layer.nbytes for layer in self.layers.values())

    def append(self, pairs: Mapping[int, tuple[Tensor, Tensor]], lengths: Tensor | None = None) -> None:
        """Stores the pairs of all memory layers, or of none if a layer is missing.

        Args:
            pairs: For each memory layer keys and values (B, G, n, D), keys as if at position 0.
            lengths: (B,) pairs that count in each row; None means n.

        Raises:
            SettingError: A memory layer's pairs are missing.
        """
        missing = [layer for layer in self.layers if layer not in pairs]
        if missing:
            raise SettingError("pairs", sorted(pairs), f"lacks memory layers {missing}", "Give all memory layers.")
        added = torch.tensor([next(iter(pairs.values()))[0].shape[2]]) if pairs else torch.zeros(1, dtype=torch.int64)
        self._make_room(added if lengths is None else lengths)
        for number, layer in self.layers.items():
            keys, values = pairs[number]
            # Stored pairs outlive the pass: no graph, and no inference tensors that training could not use.
            layer.append(keys.detach(), values.detach(), lengths)

    def _make_room(self, added: Tensor) -> None:
        if self.capacity is None or not self.layers:
            return
        if int(added.max()) > self.capacity:
            raise SettingError(
                "model.memory.capacity",
                self.capacity,
                f"is less than the {int(added.max())} tokens of one window",
                "Raise it to a few windows at least.",
            )
        lengths = self.lengths
        if int((lengths + added).max()) <= self.capacity:
            return
        room = (self.capacity - self.capacity // EVICTED_SHARE - added).clamp_min(0).expand_as(lengths)
        for layer in self.layers.values():
            layer.keep_last(torch.minimum(lengths, room))

    def snapshot(self) -> Memory:
        """An independent memory that shares what is stored so far: O(1), copied on write."""
        other = object.__new__(Memory)
        other.__dict__.update(self.__dict__)
        other.tokens_seen = self.tokens_seen.clone()
        other.layers = {number: layer.snapshot() for number, layer in self.layers.items()}
        return other

    def select_rows(self, rows: Tensor) -> Memory:
        """A new memory whose row i holds a copy of what row ``rows[i]`` holds here (beam search)."""
        other = object.__new__(Memory)
        other.__dict__.update(self.__dict__)
        other.batch_size = len(rows)
        other.tokens_seen = self.tokens_seen[rows.cpu()]
        other.layers = {number: layer.select_rows(rows, self.retriever) for number, layer in self.layers.items()}
        return other

    def reset(self) -> None:
        """Forgets everything stored."""
        self.tokens_seen.zero_()
        for layer in self.layers.values():
            layer.reset()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the memory as safetensors and JSON; what the folder held before is replaced whole or not at all.

        Raises:
            SettingError: The folder cannot be written.
        """
        from lightning_fot.persistence import save_memory

        save_memory(self, folder)

    def flush(self) -> None:
        """Builds now whatever index work is pending, and waits for it."""
        for layer in self.layers.values():
            layer.retriever.flush()

    def __repr__(self) -> str:
        return (
            f"Memory(tokens={self.lengths.tolist()}, layers={list(self.layers)}, retriever={self.retriever!r}, "
            f"bytes={self.nbytes})"
        )
