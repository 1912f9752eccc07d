"""The pairs of one memory layer, and the retriever over its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.memory.base import BaseLayer
from lightning_fot.memory.found import Retrieved
from lightning_fot.retrievers.keys.store import KeyStore
from lightning_fot.retrievers.registry import create_retriever

if TYPE_CHECKING:
    from lightning_fot.retrievers.base import Retriever


class MemoryLayer(BaseLayer):
    """A layer whose pairs lie in this process. Oldest pairs that were dropped stay in the stores, out of sight, until
    :meth:`keep` packs them.

    Args:
        kv_heads: G.
        keys: B·G banks of keys; bank = row · G + KV head.
        values: The same of values.
        spec: Specification of the retriever, as ``MemoryConfig.retriever`` for one layer.
        retriever: Over ``keys``; None makes one by ``spec``.
        dropped: For each row how many of its oldest pairs do not count any more; None means none.
    """

    def __init__(
        self,
        kv_heads: int,
        keys: KeyStore,
        values: KeyStore,
        spec: RetrieverSpec,
        retriever: Retriever | None = None,
        dropped: Sequence[int] | None = None,
    ) -> None:
        self.batch_size = keys.banks // kv_heads
        self.kv_heads = kv_heads
        self.key_dim, self.value_dim = keys.dim, values.dim
        self.key_store = keys
        self.value_store = values
        self._spec = spec
        if retriever is None:
            retriever = create_retriever(spec, keys.dim, keys.banks)
            retriever.use_store(keys)
        self._retriever: Retriever = retriever
        self.dropped = [0] * self.batch_size if dropped is None else list(dropped)
        """For each row how many of its oldest pairs, still in the stores, do not count any more."""

    @classmethod
    def empty(
        cls,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        spec: RetrieverSpec,
        dtype: torch.dtype,
        device: torch.device,
        key_folder: str | None = None,
        value_folder: str | None = None,
    ) -> Self:
        """A layer without pairs.

        Args:
            batch_size: B, independent rows.
            kv_heads: G.
            head_dim: D of keys.
            value_dim: D of values.
            spec: Specification of the retriever.
            dtype: Stored dtype.
            device: Where the pairs are kept.
            key_folder: Keep the keys in a file of this folder; None keeps them in memory.
            value_folder: The same for the values.
        """
        banks = batch_size * kv_heads
        keys = KeyStore(head_dim, banks, dtype, device, key_folder)
        return cls(kv_heads, keys, KeyStore(value_dim, banks, dtype, device, value_folder), spec)

    @property
    def retriever(self) -> Retriever:
        """Over the keys."""
        return self._retriever

    @property
    def codings(self) -> tuple[object | None, ...]:
        return self.key_store.quantiser, self.value_store.quantiser

    @property
    def lengths(self) -> list[int]:
        stored = self.key_store.lengths_list[:: self.kv_heads]
        return [length - dropped for length, dropped in zip(stored, self.dropped, strict=True)]

    @property
    def keys(self) -> Tensor:
        return self._rows(self.key_store)

    @property
    def values(self) -> Tensor:
        return self._rows(self.value_store)

    def key_blocks(self, bank: int, size: int = 65536) -> Iterator[tuple[int, Tensor]]:
        first = self.dropped[bank // self.kv_heads]
        for start, keys in self.key_store.blocks(bank, first, None, size):
            yield start - first, keys

    @property
    def nbytes(self) -> int:
        return self.key_store.nbytes + self.value_store.nbytes + self.retriever.nbytes

    @property
    def indexed_share(self) -> float:
        return float(self.retriever.indexed.sum() / self.key_store.lengths.sum().clamp_min(1))

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
        per_bank = None if lengths is None else lengths.repeat_interleave(self.kv_heads)
        folded = keys.flatten(0, 1)
        self.key_store.append(folded, per_bank)
        self.value_store.append(values.flatten(0, 1), per_bank)
        self.retriever.add(folded, per_bank)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Takes back the newest pairs: row b keeps its first ``lengths[b]``."""
        banks = [
            length + dropped
            for length, dropped in zip(lengths, self.dropped, strict=True)
            for _ in range(self.kv_heads)
        ]
        self.key_store.truncate(banks)
        self.value_store.truncate(banks)

    def search(self, queries: Tensor, k: int) -> Tensor:
        rows = self._split(self.retriever.search(queries.flatten(0, 1), k))
        if not any(self.dropped):
            return rows
        return torch.where(rows < 0, rows, rows - self._shift(rows.device))

    def observe(self, queries: Tensor) -> None:
        self.retriever.observe(queries.flatten(0, 1))

    def gather(self, rows: Tensor) -> Retrieved:
        index = self._stored(rows)
        keys, values = self._take(self.key_store, index), self._take(self.value_store, index)
        return Retrieved(keys, values, rows >= 0, rows)

    def keys_at(self, rows: Tensor) -> Tensor:
        """(B, G, Q, K, D) keys of the pairs of numbers (B, G, Q, K); any for -1."""
        return self._take(self.key_store, self._stored(rows))

    def values_at(self, rows: Tensor) -> Tensor:
        """(B, G, Q, K, D) values, as :meth:`keys_at`."""
        return self._take(self.value_store, self._stored(rows))

    def _stored(self, rows: Tensor) -> Tensor:
        """Numbers in the stores."""
        index = rows.clamp_min(0)
        return index + self._shift(rows.device) if any(self.dropped) else index

    def _take(self, store: KeyStore, index: Tensor) -> Tensor:
        return store.gather(index.flatten(0, 1).flatten(1)).view(*index.shape, store.dim)

    def drop_oldest(self, counts: Sequence[int]) -> None:
        gone = []
        for row, count in enumerate(counts):
            first = self.dropped[row]
            self.dropped[row] = first + count
            numbers = torch.arange(first, first + count, device=self.key_store.device) if count else None
            gone += [numbers] * self.kv_heads
        self.retriever.remove(gone)

    def keep(self, masks: Sequence[Tensor]) -> None:
        stored = []
        for mask, dropped in zip(masks, self.dropped, strict=True):
            whole = torch.cat([torch.zeros(dropped, dtype=torch.bool), mask.cpu()])
            stored += [whole] * self.kv_heads
        self.key_store.keep(stored)
        self.value_store.keep(stored)
        self.dropped = [0] * self.batch_size
        self.retriever.renumber()

    def pack(self) -> None:
        self.keep([torch.ones(length, dtype=torch.bool) for length in self.lengths])

    @property
    def unpacked(self) -> int:
        return max(self.dropped)

    def use_retriever(self, spec: RetrieverSpec) -> None:
        if self.unpacked:
            # What was dropped is known to the other retriever alone.
            self.pack()
        self._spec = spec
        self._retriever = create_retriever(spec, self.key_dim, self.key_store.banks)
        self._retriever.use_store(self.key_store)
        self._retriever.renumber()

    def select_rows(self, rows: Sequence[int]) -> MemoryLayer:
        banks = [row * self.kv_heads + head for row in rows for head in range(self.kv_heads)]
        keys, values = self.key_store.select(banks), self.value_store.select(banks)
        dropped = [self.dropped[row] for row in rows]
        chosen = self.retriever.select(banks, keys)
        if chosen is not None:
            return MemoryLayer(self.kv_heads, keys, values, self._spec, chosen, dropped)
        # It keeps keys of its own, so it has to be told them again.
        counted = [
            torch.arange(length) >= dropped[bank // self.kv_heads] for bank, length in enumerate(keys.lengths_list)
        ]
        keys.keep(counted)
        values.keep(counted)
        other = MemoryLayer(self.kv_heads, keys, values, self._spec)
        other.retriever.add(keys.view(), keys.lengths)
        return other

    def mark(self) -> Callable[[], None]:
        keys, values, dropped, removed = (
            self.key_store.fork(), self.value_store.fork(), list(self.dropped), self.retriever.removed,
        )  # fmt: skip

        def back() -> None:
            self.key_store.become(keys)
            self.value_store.become(values)
            self.dropped = dropped
            self.retriever.taken_back(removed)

        return back

    def reset(self) -> None:
        self.key_store.reset()
        self.value_store.reset()
        self.retriever.reset()
        self.dropped = [0] * self.batch_size

    def snapshot(self) -> MemoryLayer:
        keys = self.key_store.fork()
        retriever = self.retriever.fork(keys)
        return MemoryLayer(self.kv_heads, keys, self.value_store.fork(), self._spec, retriever, self.dropped)

    def _shift(self, device: torch.device) -> Tensor:
        return torch.tensor(self.dropped, device=device)[:, None, None, None]

    def _rows(self, store: KeyStore) -> Tensor:
        whole = self._split(store.view())
        if not any(self.dropped):
            return whole
        if len(set(self.dropped)) == 1:
            return whole[:, :, self.dropped[0] :]
        places = torch.arange(max(self.lengths), device=whole.device)[None, None, :, None] + self._shift(whole.device)
        return whole.gather(2, places.clamp_max(whole.shape[2] - 1).expand(-1, self.kv_heads, -1, whole.shape[3]))

    def _split(self, folded: Tensor) -> Tensor:
        """(B·G, ...) → (B, G, ...)."""
        return folded.reshape(self.batch_size, self.kv_heads, *folded.shape[1:])
