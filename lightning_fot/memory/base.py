"""What a memory layer is to those who read and fill it, wherever its pairs lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.memory.found import Found, Retrieved, Scoring, Shown
from lightning_fot.retrievers.stats import RetrieverStats


class Searching(Protocol):
    """The retriever of a layer, as measurements ask it: a :class:`~lightning_fot.retrievers.Retriever`, or several."""

    @property
    def exact(self) -> bool:
        """Whether every key is scored."""

    @property
    def indexed(self) -> Tensor:
        """(banks,) int64: keys that an index covers."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds itself."""

    def stats(self) -> RetrieverStats:
        """A copy of the counters."""

    def flush(self) -> None:
        """Build now whatever is pending, and wait for it."""


class BaseLayer(ABC):
    """Banks (row, KV head) of keys and values, and the search over the keys.

    Pairs of a row are numbered from 0, the oldest, to the row's length - 1.
    """

    batch_size: int
    kv_heads: int
    key_dim: int
    """D of keys."""
    value_dim: int
    """D of values."""

    @property
    @abstractmethod
    def retriever(self) -> Searching:
        """What searches."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Pairs of each row."""

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """(B, G, M, D) in a floating dtype; rows shorter than M end in unused places. A view where that is possible."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """(B, G, M, D), as :attr:`keys`."""

    @abstractmethod
    def key_blocks(self, bank: int, size: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """Keys of a bank (a row's KV head, B·G of them) in pieces, for a scan that copies few at a time.

        Yields:
            The number of the first pair, and at most ``size`` keys (n, D) in a floating dtype.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys, values and index."""

    @property
    @abstractmethod
    def codings(self) -> tuple[object | None, ...]:
        """What stored vectors were coded with: others, once what was stored before has been coded anew."""

    @property
    @abstractmethod
    def indexed_share(self) -> float:
        """Part of the keys that an index covers, 0 to 1."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
        """Stores pairs behind those already there; :meth:`settle` says when they are.

        Args:
            keys: (B, G, n, D), as if at position 0.
            values: (B, G, n, D).
            lengths: (B,) pairs that count in each row; None means n.
        """

    def settle(self) -> None:
        """Waits until what was changed has been changed, and raises what went wrong."""
        return

    def observe(self, queries: Tensor) -> None:
        """Shows the retriever queries (B, G, Q, D), which it may learn from."""
        return

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> Tensor:
        """Numbers of the pairs with the k largest inner products.

        Args:
            queries: (B, G, Q, D), rotated as the layer uses them.
            k: Pairs wanted.

        Returns:
            (B, G, Q, k) int64, -1 where a row holds fewer.
        """

    @abstractmethod
    def gather(self, rows: Tensor) -> Retrieved:
        """The pairs of numbers (B, G, Q, K), -1 for none."""

    def read(self, queries: Tensor, k: int, dense_pairs: int = 0, scoring: Scoring | None = None) -> Found | None:
        """What the queries attend to.

        Args:
            queries: (B, G, Q, D), as :meth:`search` takes them.
            k: Pairs wanted for each.
            dense_pairs: Pairs of a row up to which all are wanted.
            scoring: How they are scored; None wants the pairs themselves.

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

    @abstractmethod
    def drop_oldest(self, counts: Sequence[int]) -> None:
        """Drops the ``counts[b]`` oldest pairs of row b; those left are numbered from 0 again."""

    @abstractmethod
    def keep(self, masks: Sequence[Tensor]) -> None:
        """Keeps the pairs of row b where ``masks[b]``, (M_b,) bool, is True; they are packed and indexed anew."""

    @abstractmethod
    def pack(self) -> None:
        """Gives back the room of dropped pairs."""

    @property
    @abstractmethod
    def unpacked(self) -> int:
        """Dropped pairs of a row that still take room."""

    @abstractmethod
    def use_retriever(self, spec: RetrieverSpec) -> None:
        """Searches the same pairs with another retriever, specified as for a single layer."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> BaseLayer:
        """A new layer whose row i is a snapshot of row ``rows[i]``: nothing is copied."""

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """What takes back all that is done to the layer from now on: nothing is copied."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets all pairs."""

    @abstractmethod
    def snapshot(self) -> BaseLayer:
        """An independent layer that shares what is stored so far: O(1)."""
