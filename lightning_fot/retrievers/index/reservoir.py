"""A bounded uniform sample of past queries for each bank."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

_CAPACITY = 4096
_PER_CALL = 256


class QueryReservoir:
    """Keeps up to 4096 queries a bank, each call's queries thinned to 256.

    Args:
        dim: Head size D.
        banks: Number of banks.
        seed: For the choice of what to keep.
    """

    def __init__(self, dim: int, banks: int, seed: int) -> None:
        self._kept = torch.zeros(banks, 0, dim, dtype=torch.float32)
        self._seen = [0] * banks
        self._generator = torch.Generator().manual_seed(seed)
        self._shared = False
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._kept.numel() * self._kept.element_size()

    def bank(self, bank: int) -> Tensor:
        """Queries kept for a bank (m, dim) float32; they may be replaced by others as more are observed."""
        with self._lock:
            return self._kept[bank, : min(self._seen[bank], _CAPACITY)]

    def observe(self, queries: Tensor) -> None:
        """Take in queries (banks, q, dim) float32."""
        count = queries.shape[1]
        # Rows of a batch may be read in several threads, and each observes.
        with self._lock:
            if count > _PER_CALL:
                kept = torch.randperm(count, generator=self._generator)[:_PER_CALL]
                queries = queries[:, kept.to(queries.device)]
            queries = queries.cpu()
            self._own(max(self._seen) + queries.shape[1])
            for bank in range(queries.shape[0]):
                self._observe_bank(bank, queries[bank])

    def _observe_bank(self, bank: int, queries: Tensor) -> None:
        seen, count = self._seen[bank], queries.shape[0]
        fill = min(count, max(0, _CAPACITY - seen))
        self._kept[bank, seen : seen + fill] = queries[:fill]
        if fill < count:
            # Algorithm R (Vitter 1985), a whole call at once: item i stays with probability capacity / (i + 1).
            ranks = torch.arange(seen + fill, seen + count)
            draws = (torch.rand(count - fill, generator=self._generator, dtype=torch.float32) * (ranks + 1)).long()
            taken = draws < _CAPACITY
            self._kept[bank, draws[taken]] = queries[fill:][taken]
        self._seen[bank] = seen + count

    def _own(self, need: int) -> None:
        capacity = self._kept.shape[1]
        grown = min(_CAPACITY, max(need, 2 * capacity)) if need > capacity else capacity
        if grown > capacity or self._shared:
            fresh = torch.zeros(self._kept.shape[0], grown, self._kept.shape[2], dtype=torch.float32)
            fresh[:, :capacity] = self._kept
            self._kept, self._shared = fresh, False

    def fork(self) -> QueryReservoir:
        """A snapshot in O(1), copied by whoever observes next."""
        twin = QueryReservoir.__new__(QueryReservoir)
        with self._lock:
            twin._kept, twin._seen = self._kept, list(self._seen)
            twin._generator = torch.Generator()
            twin._generator.set_state(self._generator.get_state())
            twin._shared = self._shared = True
        twin._lock = Lock()
        return twin

    def select(self, banks: Sequence[int]) -> QueryReservoir:
        """A copy whose bank i is bank ``banks[i]`` of this one."""
        twin = self.fork()
        twin._kept, twin._seen = self._kept[list(banks)], [self._seen[bank] for bank in banks]
        return twin

    def restore(self, bank: int, queries: Tensor) -> None:
        """Make ``queries`` (m, dim) all that is kept for a bank."""
        with self._lock:
            self._seen[bank] = 0
            self._own(queries.shape[0])
            self._kept[bank, : queries.shape[0]] = queries
            self._seen[bank] = queries.shape[0]

    def reset(self, banks: list[int]) -> None:
        """Forget some banks' queries."""
        with self._lock:
            for bank in banks:
                self._seen[bank] = 0

    def __getstate__(self) -> dict[str, object]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        return {**kept, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        saved = state["_generator"]
        assert isinstance(saved, Tensor)
        self._generator = torch.Generator()
        self._generator.set_state(saved)
        self._lock = Lock()
