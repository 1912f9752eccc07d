"""The pairs of one memory layer, and the retriever over its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.memory.found import Retrieved, Shown
from lightning_fot.retrievers.keys.store import KeyStore
from lightning_fot.retrievers.registry import create_retriever

if TYPE_CHECKING:
    from lightning_fot.retrievers.base import Retriever


class MemoryLayer:
    """Banks (row, KV head) of keys and values, and the retriever over the keys.

    Pairs of a row are numbered from 0, the oldest, to the row's length - 1. Oldest pairs that were dropped stay in the
    stores, out of sight, until :meth:`keep` packs them.

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
        self.key_store = keys
        self.value_store = values
        self._spec = spec
        if retriever is None:
            retriever = create_retriever(spec, keys.dim, keys.banks)
            retriever.use_store(keys)
        self.retriever: Retriever = retriever
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
    def lengths(self) -> list[int]:
        """Pairs of each row."""
        stored = self.key_store.lengths_list[:: self.kv_heads]
        return [length - dropped for length, dropped in zip(stored, self.dropped, strict=True)]

    @property
    def keys(self) -> Tensor:
        """(B, G, M, D) in a floating dtype; rows shorter than M end in unused places. A view where that is possible."""
        return self._rows(self.key_store)

    @property
    def values(self) -> Tensor:
        """(B, G, M, D), as :attr:`keys`."""
        return self._rows(self.value_store)

    def key_blocks(self, bank: int, size: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """Keys of a bank (a row's KV head, B·G of them) in pieces, for a scan that copies few at a time.

        Yields:
            The number of the first pair, and at most ``size`` keys (n, D) in a floating dtype.
        """
        first = self.dropped[bank // self.kv_heads]
        for start, keys in self.key_store.blocks(bank, first, None, size):
            yield start - first, keys

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
        """Numbers of the pairs with the k largest inner products.

        Args:
            queries: (B, G, Q, D), rotated as the layer uses them.
            k: Pairs wanted.

        Returns:
            (B, G, Q, k) int64, -1 where a row holds fewer.
        """
        rows = self._split(self.retriever.search(queries.flatten(0, 1), k))
        if not any(self.dropped):
            return rows
        return torch.where(rows < 0, rows, rows - self._shift(rows.device))

    def gather(self, rows: Tensor) -> Retrieved:
        """The pairs of numbers (B, G, Q, K), -1 for none."""
        valid = rows >= 0
        index = rows.clamp_min(0)
        if any(self.dropped):
            index = index + self._shift(rows.device)
        folded = index.flatten(0, 1).flatten(1)

        def take(store: KeyStore) -> Tensor:
            return store.gather(folded).view(*rows.shape, store.dim)

        return Retrieved(take(self.key_store), take(self.value_store), valid, rows)

    def read(self, queries: Tensor, k: int, dense_pairs: int = 0) -> Retrieved | Shown | None:
        """What the queries attend to.

        Args:
            queries: (B, G, Q, D), as :meth:`search` takes them.
            k: Pairs wanted for each.
            dense_pairs: Pairs of a row up to which all are wanted.

        Returns:
            The k nearest pairs; all of them where there are no more than that or than ``dense_pairs``; None when empty.
        """
        lengths = self.lengths
        stored = max(lengths)
        if stored == 0:
            return None
        if stored <= max(k, dense_pairs):
            keys, values = self.keys, self.values
            if torch.is_grad_enabled():
                # A backward pass needs what was read as it was, and the stores go on to be written to.
                keys, values = keys.clone(), values.clone()
            if min(lengths) == stored:
                return Shown(keys, values)
            places = torch.arange(stored, device=queries.device)
            return Shown(keys, values, places < torch.tensor(lengths, device=queries.device)[:, None])
        return self.gather(self.search(queries, k))

    def drop_oldest(self, counts: Sequence[int]) -> None:
        """Drops the ``counts[b]`` oldest pairs of row b; those left are numbered from 0 again."""
        gone = []
        for row, count in enumerate(counts):
            first = self.dropped[row]
            self.dropped[row] = first + count
            numbers = torch.arange(first, first + count, device=self.key_store.device) if count else None
            gone += [numbers] * self.kv_heads
        self.retriever.remove(gone)

    def keep(self, masks: Sequence[Tensor]) -> None:
        """Keeps the pairs of row b where ``masks[b]``, (M_b,) bool, is True; they are packed and indexed anew."""
        stored = []
        for mask, dropped in zip(masks, self.dropped, strict=True):
            whole = torch.cat([torch.zeros(dropped, dtype=torch.bool), mask.cpu()])
            stored += [whole] * self.kv_heads
        self.key_store.keep(stored)
        self.value_store.keep(stored)
        self.dropped = [0] * self.batch_size
        self.retriever.renumber()

    def pack(self) -> None:
        """Gives back the room of dropped pairs."""
        self.keep([torch.ones(length, dtype=torch.bool) for length in self.lengths])

    @property
    def unpacked(self) -> int:
        """Dropped pairs of a row that still take room."""
        return max(self.dropped)

    def select_rows(self, rows: Sequence[int]) -> MemoryLayer:
        """A new layer whose row i is a snapshot of row ``rows[i]``: nothing is copied."""
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
        """What takes back all that is done to the layer from now on: nothing is copied."""
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
        """Forgets all pairs."""
        self.key_store.reset()
        self.value_store.reset()
        self.retriever.reset()
        self.dropped = [0] * self.batch_size

    def snapshot(self) -> MemoryLayer:
        """An independent layer that shares what is stored so far: O(1)."""
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
